// What the tests share: `that`, CHECK and CHECK_THROWS, which say what does not hold and count it.
#pragma once

#include <cstdio>
#include <stdexcept>

inline int failures = 0;

inline void that(bool holds, const char* what, int line = __builtin_LINE()) {
    if (holds) return;
    std::printf("line %d: %s\n", line, what);
    ++failures;
}
#define CHECK(condition) that(condition, #condition)

template <class Call>
bool refuses(const Call& call) {
    try {
        call();
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}
#define CHECK_THROWS(expression) that(refuses([&] { (void)(expression); }), "refuses " #expression)
