//! Why a request was not done.

use spec::FieldProblem;

use crate::admission::Denied;

/// The kind of an error. Each face of the API maps it to a status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Category {
    /// The thing asked about is not there.
    NotFound,
    /// Not in this state, or taken already.
    Conflict,
    /// An earlier request of the same kind is not over.
    Pending,
    /// The request was parsed, and is not possible.
    Unprocessable,
    /// This version cannot do it.
    Unsupported,
    /// The host lacks room or permission for it.
    Host,
    /// A fault of ours.
    Internal,
}

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct RequestError {
    /// The kind of the error.
    pub category: Category,
    /// Stable code, for programs.
    pub code: String,
    /// For people.
    pub detail: String,
    /// Which fields of the configuration it is about, if it is about fields.
    pub fields: Vec<FieldProblem>,
}

impl RequestError {
    /// An error that is about no field.
    pub fn new(category: Category, code: &str, detail: impl Into<String>) -> Self {
        Self {
            category,
            code: code.to_owned(),
            detail: detail.into(),
            fields: Vec::new(),
        }
    }

    /// There is no VM of this name.
    #[must_use]
    pub fn no_such_vm(id: &str) -> Self {
        Self::new(
            Category::NotFound,
            "no-such-vm",
            format!("no VM has the name {id:?}"),
        )
    }

    /// The driver has ended without an answer.
    #[must_use]
    pub fn driver_gone() -> Self {
        let detail = "the VM's driver has ended; delete the VM and create it again";
        Self::new(Category::Internal, "driver-gone", detail)
    }

    /// The driver has as many requests waiting as it takes.
    #[must_use]
    pub(crate) fn too_many_waiting(waiting: usize) -> Self {
        let detail = format!("{waiting} requests are waiting for this VM already; retry later");
        Self::new(Category::Host, "too-many-requests", detail)
    }

    /// The configuration has these problems.
    #[must_use]
    pub fn invalid(fields: Vec<FieldProblem>) -> Self {
        let all_unsupported = fields.iter().all(|field| field.code == spec::UNSUPPORTED);
        let (category, code) = match all_unsupported {
            true => (Category::Unsupported, "unsupported-configuration"),
            false => (Category::Unprocessable, "invalid-configuration"),
        };
        let detail = match &fields[..] {
            [only] => format!("the configuration is invalid: {}", only.detail),
            many => format!("the configuration has {} problems", many.len()),
        };
        Self {
            category,
            code: code.to_owned(),
            detail,
            fields,
        }
    }
}

impl From<Denied> for RequestError {
    fn from(denied: Denied) -> Self {
        Self::new(Category::Conflict, "wrong-state", denied.to_string())
    }
}
