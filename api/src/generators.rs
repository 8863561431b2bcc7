//! Changes to the document for the generators of clients, which read less of it than a person does.

use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::{Components, OpenApi, Ref, RefOr, Schema};

use crate::refusals::{ANY_OTHER, refer_to_strings};
use crate::tags::ONE_VM;

/// Makes the document suit generators: describes optional fields where generators look for a
/// description, and gives every operation of the service's own face a type for all errors.
pub(crate) fn suit(document: &mut OpenApi) {
    if let Some(components) = &mut document.components {
        describe_optional_fields(components);
    }
    let items = document.paths.paths.values_mut();
    items.flat_map(operations).for_each(declare_errors);
}

/// Moves the description of each optional field of a named type from `oneOf: [{ $ref, description },
/// { type: null }]`, where utoipa writes it, to beside `oneOf`. Generators ignore what is beside
/// `$ref`, as OpenAPI 3.0 demanded, so they would leave the field without a description.
fn describe_optional_fields(components: &mut Components) {
    for schema in components.schemas.values_mut() {
        let RefOr::T(Schema::Object(object)) = schema else {
            continue;
        };
        for property in object.properties.values_mut() {
            let RefOr::T(Schema::OneOf(one_of)) = property else {
                continue;
            };
            for item in &mut one_of.items {
                if let RefOr::Ref(named) = item
                    && !named.description.is_empty()
                {
                    one_of.description = Some(std::mem::take(&mut named.description));
                }
            }
        }
    }
}

/// Declares that every status without a response of its own comes with a problem body. The service
/// refuses any request in some ways (a web page's origin, too many requests). A generated client
/// returns nothing for an undeclared status, which its caller cannot tell from an empty success.
///
/// Operations of Cloud Hypervisor's face are left as its contract has them, with the errors that it
/// answers: arrays of strings.
fn declare_errors(operation: &mut Operation) {
    let mut tags = operation.tags.iter().flatten();
    if tags.any(|tag| tag == ONE_VM) {
        refer_to_strings(operation);
        return;
    }
    let problem = Ref::from_response_name(ANY_OTHER).into();
    let responses = &mut operation.responses.responses;
    responses.insert("default".to_owned(), problem);
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let methods = [
        &mut item.get,
        &mut item.put,
        &mut item.post,
        &mut item.delete,
    ];
    methods.into_iter().flatten()
}
