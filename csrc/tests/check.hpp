// What the tests share: `that` and CHECK, which say what does not hold and count it.
#pragma once

#include <cstdio>
#include <source_location>

inline int failures = 0;

inline void that(bool holds, const char* what, std::source_location where = std::source_location::current()) {
    if (holds) return;
    std::printf("line %u: %s\n", static_cast<unsigned>(where.line()), what);
    ++failures;
}
#define CHECK(condition) that(condition, #condition)
