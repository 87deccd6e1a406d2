// What the tests share: CHECK, which says what does not hold and counts it.
#pragma once

#include <cstdio>

inline int failures = 0;

inline void that(bool holds, const char* what, int line) {
    if (holds) return;
    std::printf("line %d: %s\n", line, what);
    ++failures;
}
#define CHECK(condition) that(condition, #condition, __LINE__)
