//! From a request to its answer. Nothing here waits.

use std::{fmt::Write as _, time::Instant};

use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::{Body, Bytes},
    header::{
        ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE,
        X_CONTENT_TYPE_OPTIONS,
    },
};
use tracing::error;

use super::{BODY_MAX, Check, Health, Server, access::Refused, connections::Connection, query};
use crate::metrics::{Method, Route};

const TEXT: &str = "text/plain; charset=utf-8";
/// The text format of `prometheus`'s encoder.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

type Answer = Response<Full<Bytes>>;

pub(crate) fn answer<B: Body>(
    server: &Server,
    connection: &Connection,
    request: &Request<B>,
) -> Answer {
    let start = Instant::now();
    let answering = connection.ask();
    let (route, method) = (route(request.uri().path()), method(request.method()));
    let mut answer = match refusal(server, request, route, method, answering.crowded) {
        Some(refusal) => refusal,
        None => answer_route(server, route, request.uri().query()),
    };
    let headers = answer.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if !request.body().is_end_stream() {
        // Nothing reads bodies; to skip one costs more than a new connection.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if route == Route::Metrics && answer.status() == StatusCode::OK {
        connection.end_with_this_answer();
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    server.state.metrics.http_request(route, method, answer.status().as_u16(), start.elapsed());
    answer
}

fn route(path: &str) -> Route {
    match path {
        "/metrics" => Route::Metrics,
        "/livez" => Route::Livez,
        "/readyz" => Route::Readyz,
        _ => Route::Other,
    }
}

fn method(method: &hyper::Method) -> Method {
    match *method {
        hyper::Method::GET => Method::Get,
        hyper::Method::HEAD => Method::Head,
        _ => Method::Other,
    }
}

/// Why a request is not answered, in the order of what must not be told to strangers.
fn refusal<B: Body>(
    server: &Server,
    request: &Request<B>,
    route: Route,
    method: Method,
    crowded: bool,
) -> Option<Answer> {
    match server.access.check(request) {
        Ok(()) => {}
        Err(Refused::NoHost) => return Some(text(StatusCode::BAD_REQUEST, "no Host header\n")),
        Err(Refused::Host) => {
            let hint = "this Host is not allowed: add it to http.hosts\n";
            return Some(text(StatusCode::FORBIDDEN, hint));
        }
        Err(Refused::Token) => {
            let hint = "a token is needed, as Bearer or as the password of Basic\n";
            let mut answer = text(StatusCode::UNAUTHORIZED, hint);
            let ask = HeaderValue::from_static("Basic realm=\"ghostwatch\", charset=\"UTF-8\"");
            answer.headers_mut().insert(WWW_AUTHENTICATE, ask);
            return Some(answer);
        }
    }
    if method == Method::Other {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Some(answer);
    }
    if BODY_MAX < request.body().size_hint().lower() {
        return Some(text(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large\n"));
    }
    let kept = route != Route::Other;
    (crowded && !kept).then(|| text(StatusCode::SERVICE_UNAVAILABLE, "too many connections\n"))
}

fn answer_route(server: &Server, route: Route, query: Option<&str>) -> Answer {
    let verbose = query::verbose(query);
    match route {
        Route::Metrics => match server.scrapes.take(&server.state.metrics) {
            Ok(metrics) => answer_with(StatusCode::OK, METRICS, metrics),
            Err(error) => {
                error!(error = format!("{error:#}"), "the metrics cannot be written");
                text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written\n")
            }
        },
        Route::Livez => health(&(server.state.live)(), verbose),
        Route::Readyz => health(&(server.state.ready)(), verbose),
        Route::Other => text(StatusCode::NOT_FOUND, "try /metrics, /livez or /readyz?verbose\n"),
    }
}

/// One word, or a line for each check: `[+]` ok, `[~]` degraded, `[-]` failed.
fn health(checks: &[Check], verbose: bool) -> Answer {
    let worst = |health| checks.iter().any(|it| it.health == health);
    let (status, word) = match (worst(Health::Failed), worst(Health::Degraded)) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "failed"),
        (false, true) => (StatusCode::OK, "degraded"),
        (false, false) => (StatusCode::OK, "ok"),
    };
    let mut body = String::new();
    for check in checks.iter().filter(|it| verbose || it.health == Health::Failed) {
        let sign = match check.health {
            Health::Ok => '+',
            Health::Degraded => '~',
            Health::Failed => '-',
        };
        let colon = if check.detail.is_empty() { "" } else { ": " };
        // One check is one line, whatever a camera or driver has said.
        let detail = check.detail.replace(char::is_control, " ");
        writeln!(body, "[{sign}] {}{colon}{detail}", check.name)
            .expect("writing to a string succeeds");
    }
    answer_with(status, TEXT, format!("{body}{word}\n"))
}

fn text(status: StatusCode, body: &'static str) -> Answer {
    answer_with(status, TEXT, body)
}

fn answer_with(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}
