//! Configuration and wire types of the service, and their validation.
