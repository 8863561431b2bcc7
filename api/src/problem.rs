//! Refusals: what the service answers when it does not do what was asked (RFC 9457).

use axum::response::{IntoResponse, Response};
use http::header::{ALLOW, CONTENT_TYPE, WWW_AUTHENTICATE};
use http::{HeaderName, HeaderValue, StatusCode};
use spec::{FieldProblem, Problem};

use crate::json::ascii_json;

/// An answer that says why something was not done.
///
/// The codes that the interface itself uses are here; the others come from the commands.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    // Boxed, since it is the error of every handler.
    problem: Box<Problem>,
    /// The header that HTTP demands of some statuses.
    header: Option<(HeaderName, HeaderValue)>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &str, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error");
        let problem = Box::new(Problem::new(status.as_u16(), title, code, detail));
        Self {
            problem,
            header: None,
        }
    }

    /// Like [`new`](Self::new), with problems of single fields of the body.
    pub(crate) fn with_fields(
        status: StatusCode,
        code: &str,
        detail: impl Into<String>,
        errors: Vec<FieldProblem>,
    ) -> Self {
        let mut refusal = Self::new(status, code, detail);
        refusal.problem.errors = errors;
        refusal
    }

    /// Returns the error for a request whose body has the configuration at `pointer`, and not as a whole.
    pub(crate) fn below(mut self, pointer: &str) -> Self {
        for field in &mut self.problem.errors {
            field.pointer.insert_str(0, pointer);
        }
        self
    }

    /// 405 with the methods that would do (RFC 9110, 15.5.6).
    pub(crate) fn method_not_allowed(
        method: &http::Method,
        path: &str,
        allow: HeaderValue,
    ) -> Self {
        let would = allow.to_str().unwrap_or_default().replace(',', ", ");
        let detail = format!("{path} does not accept {method}; use {would}");
        let mut refusal = Self::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail);
        refusal.header = Some((ALLOW, allow));
        refusal
    }

    /// 405 for a state in which the resource takes no method: the list of those is empty, as RFC 9110
    /// (10.2.1) has it for a resource that is out of service for a time.
    pub(crate) fn not_allowed_now(code: &str, detail: impl Into<String>) -> Self {
        let mut refusal = Self::new(StatusCode::METHOD_NOT_ALLOWED, code, detail);
        refusal.header = Some((ALLOW, HeaderValue::from_static("")));
        refusal
    }

    /// 401 with the scheme that the service asks for, `Bearer` (RFC 9110, 15.5.2; RFC 6750, 3).
    pub(crate) fn unauthorized(
        challenge: &'static str,
        code: &str,
        detail: impl Into<String>,
    ) -> Self {
        let mut refusal = Self::new(StatusCode::UNAUTHORIZED, code, detail);
        refusal.header = Some((WWW_AUTHENTICATE, HeaderValue::from_static(challenge)));
        refusal
    }

    /// 500 for a fault of the service itself, which has logged it.
    pub(crate) fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal-error",
            "the service failed on this request and continues with others; its log has the details \
             under this response's X-Request-Id",
        )
    }

    pub(crate) fn not_implemented(what: &str) -> Self {
        Self::new(
            StatusCode::NOT_IMPLEMENTED,
            "not-implemented",
            format!("this version of the service cannot {what}"),
        )
    }

    /// Returns the stable code of the problem.
    #[cfg(test)]
    pub(crate) fn code(&self) -> &str {
        &self.problem.code
    }

    #[cfg(test)]
    pub(crate) fn fields(&self) -> &[FieldProblem] {
        &self.problem.errors
    }

    #[cfg(test)]
    pub(crate) fn detail(&self) -> &str {
        &self.problem.detail
    }

    pub(crate) fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        let body = ascii_json(self.problem.as_ref()).unwrap_or_default();
        let mut response = (status, body).into_response();
        // For the face that writes errors in another form.
        response.extensions_mut().insert(*self.problem);
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some((name, value)) = self.header {
            headers.insert(name, value);
        }
        response
    }
}
