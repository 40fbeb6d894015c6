//! What a request's query asks for. Pure; what is not known is ignored.

/// Whether health is asked for check by check.
pub(crate) fn verbose(query: Option<&str>) -> bool {
    let asks = |it| matches!(it, "verbose" | "verbose=" | "verbose=1" | "verbose=true");
    query.is_some_and(|it| it.split('&').any(asks))
}
