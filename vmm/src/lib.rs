//! A machine: building it from a specification, its driver, vCPU threads and the pool.
