// Values for tests, different ones at every call.
#pragma once

#include <cstddef>
#include <random>
#include <vector>

#include "half.hpp"

inline std::mt19937 random_bits(0);

template <class T = float>
std::vector<T> noise(std::size_t size, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<T> values(size);
    for (T& value : values) usf::narrow(normal(random_bits), value);
    return values;
}

// To the nearest number in bfloat16.
inline float rounded(float value) {
    usf::BFloat16 half;
    usf::narrow(value, half);
    return usf::widen(half);
}
