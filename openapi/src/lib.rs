//! The generated OpenAPI document and the typed client.
