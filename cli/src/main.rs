//! wh-remote: the command line client.

fn main() {}
