//! Code that must not compile: reading the map while it is being changed.

#[test]
fn nothing_reads_the_map_through_an_open_transaction() {
    let cases = trybuild::TestCases::new();
    cases.compile_fail("tests/fail/*.rs");
}
