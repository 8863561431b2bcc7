//! Guest address spaces: region tree, transactions, flat views, listeners, dirty bitmaps.
