//! Out-of-process tests and benchmarks, through the client only.
