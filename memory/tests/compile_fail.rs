//! Code that must not compile: reading the map while it is being changed.

#[test]
fn open_transaction_blocks_readers() {
    let cases = trybuild::TestCases::new();
    cases.compile_fail("tests/fail/*.rs");
}
