//! Routes, and what the document says of them.
//!
//! The document of a face takes about a megabyte and as much code, and few clients read it. Routes
//! therefore carry the means to describe them, and a description is made when a client asks for one.

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::routing::MethodRouter;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

use crate::document::frame;
use crate::generators;

type Describe = Box<dyn Fn() -> OpenApi + Send + Sync>;

/// The handlers of one path.
pub(crate) struct Group<S> {
    path: String,
    methods: MethodRouter<S>,
    describe: fn() -> UtoipaMethodRouter<S>,
}

impl<S> Group<S> {
    /// To be called by [`routes!`] only, which sees to it that `describe` belongs to the handlers.
    pub(crate) fn new(
        path: String,
        methods: MethodRouter<S>,
        describe: fn() -> UtoipaMethodRouter<S>,
    ) -> Self {
        Self {
            path,
            methods,
            describe,
        }
    }
}

/// Makes a [`Group`] of functions with `#[utoipa::path]`, all of one path.
macro_rules! routes {
    ($first:ident $(, $rest:ident)*) => {
        // The attribute gives each handler a type of this name.
        ::utoipa_axum::paste! {{
            use ::utoipa::Path as _;
            use ::utoipa_axum::PathItemExt as _;
            let methods = ::axum::routing::MethodRouter::new();
            let methods = [<__path_ $first>]::methods()
                .iter()
                .fold(methods, |methods, one| methods.on(one.to_method_filter(), $first));
            $(
                let methods = [<__path_ $rest>]::methods()
                    .iter()
                    .fold(methods, |methods, one| methods.on(one.to_method_filter(), $rest));
            )*
            $crate::routes::Group::new(
                [<__path_ $first>]::path(),
                methods,
                || ::utoipa_axum::routes!($first $(, $rest)*),
            )
        }}
    };
}

pub(crate) use routes;

/// Routes whose handlers share a state.
pub(crate) struct Routes<S = ()> {
    router: Router<S>,
    paths: Vec<String>,
    descriptions: Vec<Describe>,
}

impl<S: Clone + Send + Sync + 'static> Default for Routes<S> {
    fn default() -> Self {
        Self {
            router: Router::new(),
            paths: Vec::new(),
            descriptions: Vec::new(),
        }
    }
}

impl<S: Clone + Send + Sync + 'static> Routes<S> {
    pub(crate) fn routes(mut self, group: Group<S>) -> Self {
        let Group {
            path,
            methods,
            describe,
        } = group;
        self.router = self.router.route(&path, methods);
        self.paths.push(path);
        let describe = move || OpenApiRouter::new().routes(describe()).into_openapi();
        self.descriptions.push(Box::new(describe));
        self
    }

    pub(crate) fn merge(mut self, other: Self) -> Self {
        self.router = self.router.merge(other.router);
        self.paths.extend(other.paths);
        self.descriptions.extend(other.descriptions);
        self
    }

    pub(crate) fn with_state(self, state: S) -> Routes {
        Routes {
            router: self.router.with_state(state),
            paths: self.paths,
            descriptions: self.descriptions,
        }
    }

    /// Adds what the routes say of themselves to a document.
    pub(crate) fn describe(&self, document: &mut OpenApi) {
        for describe in &self.descriptions {
            document.merge(describe());
        }
    }

    /// Splits the routes from their description.
    pub(crate) fn split(self) -> (Router<S>, Described) {
        let described = Described {
            paths: self.paths,
            descriptions: self.descriptions,
            json: OnceLock::new(),
        };
        (self.router, described)
    }

    /// Adds a route that no document describes.
    #[cfg(test)]
    pub(crate) fn undescribed(mut self, path: &str, methods: MethodRouter<S>) -> Self {
        self.router = self.router.route(path, methods);
        self
    }
}

/// The document of a socket, made when it is first read.
pub(crate) struct Described {
    pub(crate) paths: Vec<String>,
    descriptions: Vec<Describe>,
    json: OnceLock<Arc<str>>,
}

impl Described {
    /// Adds the description of other routes. To be called before the document is read.
    pub(crate) fn also(mut self, other: Self) -> Self {
        self.paths.extend(other.paths);
        self.descriptions.extend(other.descriptions);
        self
    }

    /// Returns the document as JSON.
    pub(crate) fn json(&self) -> Arc<str> {
        let make = || {
            let mut whole = frame();
            for describe in &self.descriptions {
                whole.merge(describe());
            }
            generators::suit(&mut whole);
            whole.to_json().unwrap_or_default().into()
        };
        Arc::clone(self.json.get_or_init(make))
    }
}
