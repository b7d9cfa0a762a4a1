// Transparent huge pages for large memory that nothing has been written to yet.
//
// glibc gives blocks past 32 MiB back to Linux at every free, and trims its heap, so that the large tensors of a step fault
// anew, 4 KiB at a time. A huge page is 2 MiB.
#pragma once

#include <cstddef>

namespace dlk::cpu {

// DLKERNELS_HUGE_PAGES is 1, the default, or 0, which turns all of this off. Throws std::runtime_error for other values.
bool huge_pages_wanted();

// Blocks of at least this size: 4 MiB hold a whole huge page wherever they begin, and writing them takes 100 times as long as
// asking.
constexpr size_t kHugePagesFrom = size_t{4} << 20;

// Asks Linux to back the whole huge pages inside a block by huge pages, if the block is that large. The edges keep small
// pages, so that the block takes no more memory. Pages that are backed already stay as they are. Does nothing on other systems
// and where Linux refuses.
void ask_for_huge_pages(const void* begin, size_t bytes);

// Memory for std::free, 64-byte aligned, or null. From 2 MiB on it begins with a huge page; its last, partial one is made of
// small pages.
void* allocate_scratch(size_t bytes);

}  // namespace dlk::cpu
