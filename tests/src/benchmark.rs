//! The options of benchmarks.

use std::env;

use clap::Parser;

/// Parses the options of a benchmark, to which Cargo adds `--bench`. Ends the process after `--help`, and with
/// an error for an option that the benchmark does not have.
#[must_use]
pub fn options<T: Parser>() -> T {
    T::parse_from(env::args().filter(|argument| argument != "--bench"))
}
