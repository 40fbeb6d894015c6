//! The table of fields as JSON Schema (2020-12), for editors.

use serde_json::{Map, Value, json};

use crate::config::raw::{Absent, Field, Kind, ROOT};

/// The schema of `config.yaml`.
pub fn json() -> Value {
    let mut schema = fields(ROOT);
    let mut root = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:ghostwatch:schema:config:1",
        "title": "ghostwatch configuration",
    });
    if let (Some(root), Some(schema)) = (root.as_object_mut(), schema.as_object_mut()) {
        root.append(schema);
    }
    root
}

/// Durations, as `units` reads them. JSON Schema cannot say their bounds.
const UNITS_TIME: &str = "^[0-9]+(\\.[0-9]+)? ?(us|ms|s|m|h|d)$";
/// Sizes, the same.
const UNITS_SIZE: &str = "^[0-9]+(\\.[0-9]+)? ?(B|[KMGT]iB|kB|[MGT]B)$";

fn fields(fields: &[Field]) -> Value {
    let properties: Map<_, _> = fields.iter().map(|it| (it.name.to_owned(), field(it))).collect();
    let required = fields.iter().filter(|it| matches!(it.default, Absent::Required));
    let required: Vec<_> = required.map(|it| it.name).collect();
    let mut schema = json!({
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

fn field(it: &Field) -> Value {
    let mut schema = kind(&it.kind);
    schema["description"] = json!(it.doc);
    if let Absent::Yaml(text) = it.default {
        // What is no JSON is a text.
        schema["default"] = serde_json::from_str(text).unwrap_or_else(|_| json!(text));
    }
    schema
}

fn kind(it: &Kind) -> Value {
    match it {
        Kind::Bool => json!({ "type": "boolean" }),
        Kind::Int(least, most) => json!({ "type": "integer", "minimum": least, "maximum": most }),
        Kind::Number(least, most) => json!({ "type": "number", "minimum": least, "maximum": most }),
        Kind::Text(most) | Kind::Secret(most) => {
            json!({ "type": "string", "minLength": 1, "maxLength": most })
        }
        Kind::Choice(words) => json!({ "enum": words }),
        Kind::Duration(..) => json!({ "type": "string", "pattern": UNITS_TIME }),
        Kind::Size(..) => json!({ "type": "string", "pattern": UNITS_SIZE }),
        Kind::Time => json!({ "type": "string", "format": "date-time" }),
        Kind::List(of, least, most) => {
            json!({ "type": "array", "items": kind(of), "minItems": least, "maxItems": most })
        }
        // `streams:` with nothing after it is an empty mapping.
        Kind::Map(of) => or_null(fields(of)),
        Kind::Entries(of) => or_null(json!({
            "type": "object",
            "propertyNames": { "pattern": "^[a-z0-9][a-z0-9_-]{0,62}$" },
            "additionalProperties": fields(of),
        })),
        Kind::Or("null", of) => or_null(kind(of)),
        Kind::Or(word, of) => json!({ "anyOf": [{ "const": word }, kind(of)] }),
    }
}

fn or_null(mut schema: Value) -> Value {
    match schema.get("type") {
        Some(Value::String(name)) => {
            schema["type"] = json!([name, "null"]);
            schema
        }
        _ => json!({ "anyOf": [{ "type": "null" }, schema] }),
    }
}
