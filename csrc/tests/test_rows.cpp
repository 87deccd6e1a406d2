#include <cmath>
#include <limits>
#include <random>

#include "check.hpp"
#include "noise.hpp"
#include "rows.hpp"

using namespace usf;

namespace rows_test {

constexpr std::int64_t rows = 1037;

struct Example {
    int channels;
    std::vector<std::int64_t> index;
};

// Halves that are empty, whole, contiguous, scattered, and no multiple of 16, out of order.
std::vector<Example> examples() {
    std::mt19937 random(0);
    std::vector<Example> found;
    for (const int channels : {1, 2, 7, 16, 33, 64, 131}) {
        Example all{channels, {}}, none{channels, {}}, some{channels, {}}, second{channels, {}};
        for (int c = 0; c < channels; ++c) {
            all.index.push_back(c);
            if (random() % 2) some.index.push_back(c);
            if (c >= channels / 2) second.index.push_back(c);
        }
        Example shuffled = some;
        std::shuffle(shuffled.index.begin(), shuffled.index.end(), random);
        for (const Example& e : {all, none, some, second, shuffled}) found.push_back(e);
    }
    return found;
}

// Rows that are apart, few of them, and nothing written behind the last one.
template <class T>
void test_apart() {
    for (const auto& [channels, index] : examples())
        for (const int some : {1, 15, 16, 17, 18, 40}) {
            const int n = static_cast<int>(index.size()), stride = n + 3;
            const Half half(index.data(), n, channels);
            const std::vector<T> before = noise<T>(some * channels, 1);
            const std::vector<float> guard = noise(64);
            std::vector<float> taken((some - 1) * stride + n);
            taken.insert(taken.end(), guard.begin(), guard.end());
            const auto end = taken.end() - 64;
            std::vector<T> state = before;
            state.resize(before.size() + 64);
            half.take(before.data(), some, taken.data(), stride);
            CHECK(std::equal(end, taken.end(), guard.begin()));
            half.add(taken.data(), stride, 1.0f, some, state.data());
            std::vector<bool> changes(channels, false);
            for (int j = 0; j < n; ++j) changes[index[j]] = true;
            for (int r = 0; r < some; ++r) {
                for (int j = 0; j < n; ++j)
                    CHECK(taken[r * stride + j] == widen(before[r * channels + index[j]]));
                for (int c = 0; c < channels; ++c) {
                    const float old = widen(before[r * channels + c]);
                    CHECK(widen(state[r * channels + c]) == (changes[c] ? 2 * old : old));
                }
            }
            for (std::size_t i = before.size(); i < state.size(); ++i) CHECK(widen(state[i]) == 0);
        }
}

template <class T>
void test_halves(float tolerance) {
    for (const auto& [channels, index] : examples()) {
        const Half half(index.data(), static_cast<int>(index.size()), channels);
        const std::size_t n = index.size();
        const std::vector<T> before = noise<T>(rows * channels, 1), values = noise<T>(rows * n, 1);
        std::vector<T> taken(rows * n), state = before;
        select_rows(before.data(), rows, half, taken.data(), 2);
        add_rows(state.data(), rows, half, values.data(), -1.0f, 2);
        std::vector<bool> changes(channels, false);
        for (const std::int64_t i : index) changes[i] = true;
        for (std::int64_t r = 0; r < rows; ++r) {
            for (std::size_t j = 0; j < n; ++j) {
                const float old = widen(before[r * channels + index[j]]);
                CHECK(widen(taken[r * n + j]) == old);
                CHECK(std::abs(widen(state[r * channels + index[j]]) - (old - widen(values[r * n + j]))) <=
                      tolerance);
            }
            for (int c = 0; c < channels; ++c)
                if (!changes[c]) CHECK(widen(state[r * channels + c]) == widen(before[r * channels + c]));
        }
    }
}

template <class T>
void test_affine(float tolerance) {
    constexpr float clamp = 1.9f;
    for (const auto& [channels, index] : examples()) {
        const Half half(index.data(), static_cast<int>(index.size()), channels);
        const std::size_t n = index.size();
        const std::vector<T> before = noise<T>(rows * channels, 1), outputs = noise<T>(rows * 2 * n, 0.5f);
        const std::vector<float> shift = noise<float>(n, 1);
        std::vector<T> state = before;
        std::vector<float> log_det(rows), back(rows);
        affine_rows(state.data(), rows, half, outputs.data(), shift.data(), clamp, false, log_det.data(), 1);
        for (std::int64_t r = 0; r < rows; ++r) {
            double total = 0;
            for (std::size_t j = 0; j < n; ++j) {
                const double s = clamp * std::tanh(double(widen(outputs[r * 2 * n + j])));
                const double expected =
                    (widen(before[r * channels + index[j]]) + double(shift[j])) * std::exp(s) +
                    widen(outputs[r * 2 * n + n + j]);
                CHECK(std::abs(widen(state[r * channels + index[j]]) - expected) <=
                      tolerance * (1 + std::abs(expected)));
                total += s;
            }
            CHECK(std::abs(log_det[r] - total) <= 2e-6 * (1 + n));
        }
        std::vector<T> again = before;
        std::vector<float> log_det_again(rows);
        affine_rows(again.data(), rows, half, outputs.data(), shift.data(), clamp, false,
                    log_det_again.data(), 3);
        for (std::size_t i = 0; i < state.size(); ++i) CHECK(widen(again[i]) == widen(state[i]));
        affine_rows(state.data(), rows, half, outputs.data(), shift.data(), clamp, true, back.data(), 2);
        for (std::size_t i = 0; i < state.size(); ++i)
            CHECK(std::abs(widen(state[i]) - widen(before[i])) <=
                  20 * tolerance * (1 + std::abs(widen(before[i]))));
        for (std::int64_t r = 0; r < rows; ++r) CHECK(back[r] == -log_det[r]);
    }
}

#ifdef USF_PRODUCTS
// Without a limit, powers beyond those of normal numbers are as far as these, or where they belong.
void test_powers_without_limit() {
    for (float x = -1000; x <= 1000; x += 0.25f) {
        float power = 0;
        with_lanes(best_lanes(), [&]<int lanes>() USF_LAMBDA {
            using V = typename Vector<lanes>::type;
            power = power_of_two(V(V{} + x), std::numeric_limits<float>::max())[lanes - 1];
        });
        const double limited = std::exp2(std::clamp<double>(x, -126, 126));
        if (std::abs(x) <= 126)
            CHECK(std::abs(power / limited - 1) <= 2.4e-7);
        else
            CHECK(x < 0 ? power >= 0 && power <= limited * (1 + 2.4e-7) : power >= limited * (1 - 2.4e-7));
    }
}

// Vectors of numbers get what single numbers get, within rounding, also beyond the limits.
void test_vectors() {
    std::vector<float> values, powers, tanhs;
    for (double x = -20; x <= 20; x += 1e-3) values.push_back(static_cast<float>(x));
    values.resize(values.size() / 16 * 16);
    for (const float extreme : {-INFINITY, INFINITY, -200.0f, 200.0f, 0.0f, 1e-30f, -1e-6f, 43.0f})
        values.insert(values.end(), 16, extreme);
    powers.resize(values.size()), tanhs.resize(values.size());
    float of_nan[2] = {};
    with_lanes(best_lanes(), [&]<int lanes>() USF_LAMBDA {
        using V = typename Vector<lanes>::type;
        using U = typename Vector<lanes>::unaligned;
        for (std::size_t i = 0; i < values.size(); i += lanes) {
            const V x = *reinterpret_cast<const U*>(values.data() + i);
            *reinterpret_cast<U*>(powers.data() + i) = power_of_two(V(7.0f * x));
            *reinterpret_cast<U*>(tanhs.data() + i) = fast_tanh(x);
        }
        const V nan = V{} + std::nanf("");
        of_nan[0] = power_of_two(nan)[lanes - 1], of_nan[1] = fast_tanh(nan)[lanes - 1];
    });
    CHECK(std::isnan(of_nan[0]) && std::isnan(of_nan[1]));
    for (std::size_t i = 0; i < values.size(); ++i) {
        const double power = std::exp2(std::clamp<double>(7 * values[i], -126, 126));
        CHECK(std::abs(powers[i] / power - 1) <= 2.4e-7);
        CHECK(std::abs(tanhs[i] - std::tanh(double(values[i]))) <= 3e-7);
    }
    test_powers_without_limit();
}
#endif

void test_functions() {
    for (double x = -20; x <= 20; x += 1e-3) {
        const float value = static_cast<float>(x);
        CHECK(std::abs(fast_tanh(value) - std::tanh(double(value))) <= 3e-7);
        CHECK(std::abs(fast_exp(value) / std::exp(double(value)) - 1) <= 3e-7);
        const double power = std::exp2(std::clamp<double>(7 * value, -126, 126));
        CHECK(std::abs(power_of_two(7 * value) / power - 1) <= 2.4e-7);
    }
    constexpr float infinity = std::numeric_limits<float>::infinity();
    CHECK(fast_tanh(infinity) == 1.0f && fast_tanh(-infinity) == -1.0f);
    CHECK(std::isnan(fast_tanh(std::nanf(""))) && std::isnan(fast_exp(std::nanf(""))));
    CHECK(power_of_two(0.0f) == 1 && std::isnan(power_of_two(std::nanf(""))));
    BFloat16 half_way;
    narrow(1.00390625f, half_way);  // between 1 and 1.0078125: to the even one
    CHECK(widen(half_way) == 1.0f);
    narrow(std::nanf(""), half_way);
    CHECK(std::isnan(widen(half_way)));
}

}  // namespace rows_test

int test_rows(int, char*[]) {
    using namespace rows_test;
    test_functions();
#ifdef USF_PRODUCTS
    for (most_lanes = 4; most_lanes < 16; most_lanes *= 2) {
        test_vectors();
        test_affine<float>(2e-6f);
    }
    test_vectors();
#endif
    test_apart<float>();
    test_apart<BFloat16>();
    test_halves<float>(1e-6f);
    test_halves<BFloat16>(2e-2f);
    test_affine<float>(2e-6f);
    test_affine<BFloat16>(1e-2f);
    return failures != 0;
}
