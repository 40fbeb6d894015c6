//! `ghostwatch doctor`: looks at everything that the daemon needs, changes nothing, and says what is
//! missing and what to do. Loads no model and no CUDA library.
//!
//! [`machine`] is what is there without us, [`setup`] what is configured, [`port`] who holds one.

mod machine;
mod port;
mod setup;

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::Path,
};

use serde_json::{Value, json};

use crate::cli::{check::Format, code, text::escape};

/// How to print.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// How good something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Ok,
    /// It works, but not for everybody or not for ever.
    Warn,
    /// The daemon does not run like this.
    Fail,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "fail",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Finding {
    level: Level,
    /// What was looked at.
    what: String,
    /// What was found.
    found: String,
    /// What to do. Empty iff it is fine.
    todo: String,
}

impl Finding {
    fn ok(what: impl Into<String>, found: impl Into<String>) -> Finding {
        Finding { level: Level::Ok, what: what.into(), found: found.into(), todo: String::new() }
    }

    fn warn(what: impl Into<String>, found: impl Into<String>, todo: impl Into<String>) -> Finding {
        Finding { level: Level::Warn, todo: todo.into(), ..Finding::ok(what, found) }
    }

    fn fail(what: impl Into<String>, found: impl Into<String>, todo: impl Into<String>) -> Finding {
        Finding { level: Level::Fail, todo: todo.into(), ..Finding::ok(what, found) }
    }
}

/// Looks, and prints what was found. Exit code 1 iff something fails.
pub fn run(args: &Args, config: Option<&Path>) -> u8 {
    let (mut findings, plan) = setup::configuration(config);
    let mut all = machine::versions();
    all.append(&mut machine::gstreamer());
    all.push(machine::gpu(plan.as_ref()));
    all.append(&mut findings);
    if let Some(plan) = &plan {
        all.append(&mut setup::plan(plan));
    }
    all.append(&mut machine::system());
    let text = match args.format {
        Format::Text => text(&all),
        Format::Json => format!("{:#}\n", json(&all)),
    };
    // Whoever closed the pipe has seen enough; the exit code stands.
    drop(io::stdout().lock().write_all(text.as_bytes()));
    let failed = all.iter().any(|it| it.level == Level::Fail);
    if failed { code::FAILED } else { code::OK }
}

fn count(findings: &[Finding], level: Level) -> usize {
    findings.iter().filter(|it| it.level == level).count()
}

fn text(findings: &[Finding]) -> String {
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a string takes all text");
    for it in findings {
        line(format!("{:<4}  {}: {}", it.level.name(), escape(&it.what), escape(&it.found)));
        if !it.todo.is_empty() {
            line(format!("      -> {}", escape(&it.todo)));
        }
    }
    let [warn, fail] = [Level::Warn, Level::Fail].map(|it| count(findings, it));
    line(format!("{} looked at, {warn} warnings, {fail} failures", findings.len()));
    out
}

fn json(findings: &[Finding]) -> Value {
    let one = |it: &Finding| {
        json!({
            "level": it.level.name(),
            "what": it.what,
            "found": it.found,
            "todo": Some(&it.todo).filter(|it| !it.is_empty()),
        })
    };
    json!({
        "ok": count(findings, Level::Fail) == 0,
        "warnings": count(findings, Level::Warn),
        "failures": count(findings, Level::Fail),
        "findings": findings.iter().map(one).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_has_a_line_and_what_is_not_fine_says_what_to_do() {
        let all = [
            Finding::ok("a", "good"),
            Finding::warn("b", "odd\x1b[2J", "mend it"),
            Finding::fail("c", "gone", "get it"),
        ];
        let expected = "ok    a: good\nwarn  b: odd\\u{1b}[2J\n      -> mend it\n\
                        fail  c: gone\n      -> get it\n3 looked at, 1 warnings, 1 failures\n";
        assert_eq!(text(&all), expected);
        let json = json(&all);
        assert_eq!((&json["ok"], &json["findings"][0]["todo"]), (&json!(false), &Value::Null));
        assert_eq!(json["findings"][2]["todo"], "get it");
    }
}
