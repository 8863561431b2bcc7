//! A page to read the document with, in one file: it needs no network, and can be saved.

use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};

use crate::routes::Described;

const PAGE: &str = include_str!("docs.html");

/// The placeholder for the document in the page.
const SLOT: &str = "{{document}}";

pub(crate) fn routes(document: Arc<Described>) -> Router {
    let answer = move || {
        let page = page(&document.json());
        let headers = [
            (CONTENT_TYPE, "text/html; charset=utf-8"),
            // Nothing is fetched from anywhere.
            (
                CONTENT_SECURITY_POLICY,
                "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'",
            ),
        ];
        std::future::ready((headers, page))
    };
    Router::new().route("/docs", get(answer))
}

fn page(document: &str) -> String {
    // `</script>` and `<!--` inside of the document would end or change the element that holds it.
    PAGE.replace(SLOT, &document.replace('<', "\\u003c"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn document_is_escaped_in_page() {
        let page = page(r#"{"a": "</script><script>alert(1)</script>"}"#);
        assert_eq!(
            page.matches("</script>").count(),
            PAGE.matches("</script>").count()
        );
        assert!(page.contains(r"\u003c/script>"));
        assert!(!page.contains(SLOT));
    }
}
