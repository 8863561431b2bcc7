//! A virtual machine monitor whose machines move without noticing.

fn main() {}
