#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "noise.hpp"
#include "product.hpp"

#ifdef USF_PRODUCTS

using namespace usf;

namespace product_test {

struct Example {
    int rows, inputs, outputs;
};

// Every number of rows that a tile can leave over, and panels that are full, nearly full and nearly empty.
std::vector<Example> examples() {
    std::vector<Example> found;
    for (int rows = 0; rows <= 25; ++rows) found.push_back({rows, 7, 33});
    for (const int outputs : {1, 2, 15, 16, 17, 31, 32, 64, 100}) found.push_back({13, 20, outputs});
    for (const int inputs : {1, 2, 3, 129, 256, 257, 800}) found.push_back({13, inputs, 40});
    return found;
}

double exact(const std::vector<float>& in, int stride, const std::vector<float>& matrix, int inputs, int r,
             int o) {
    double total = 0;
    for (int i = 0; i < inputs; ++i) total += double(in[r * stride + i]) * matrix[o * inputs + i];
    return total;
}

// One chain of additions would be off by 26 roundings, root mean square.
void test_long_sums() {
    const int rows = 12, inputs = 6400, outputs = 32;
    const auto in = noise(rows * inputs), matrix = noise(outputs * inputs);
    const Weights weights(matrix.data(), nullptr, outputs, inputs);
    std::vector<float> out(rows * outputs);
    multiply(Inputs{in.data(), inputs}, rows, weights, Add{out.data(), outputs, 1.0f});
    double squares = 0, errors = 0;
    for (int r = 0; r < rows; ++r)
        for (int o = 0; o < outputs; ++o) {
            const double expected = exact(in, inputs, matrix, inputs, r, o);
            squares += expected * expected;
            errors += std::pow(out[r * outputs + o] - expected, 2);
        }
    CHECK(std::sqrt(errors / squares) <= std::ldexp(10.0, -24));
}

void test_store() {
    for (const auto& [rows, inputs, outputs] : examples()) {
        const int in_stride = inputs + 3;
        const auto in = noise(rows * in_stride), matrix = noise(outputs * inputs), bias = noise(outputs);
        const auto added = noise(rows * outputs);
        std::vector<const float*> condition;
        for (int r = 0; r < rows; ++r) condition.push_back(added.data() + r * outputs);
        const Weights weights(matrix.data(), bias.data(), outputs, inputs);
        for (const bool relu : {false, true}) {
            for (const bool conditioned : {false, true}) {
                const int stride = outputs + 1;
                std::vector<float> out(rows * stride, 7.0f);
                multiply(Inputs{in.data(), in_stride}, rows, weights,
                         Store{out.data(), stride, weights.bias(), relu ? Ending::relu : Ending::plain,
                               conditioned ? condition.data() : nullptr});
                for (int r = 0; r < rows; ++r) {
                    CHECK(out[r * stride + outputs] == 7.0f);  // beyond the outputs nothing may be written
                    for (int o = 0; o < outputs; ++o) {
                        double expected = exact(in, in_stride, matrix, inputs, r, o) + bias[o];
                        if (conditioned) expected += added[r * outputs + o];
                        if (relu) expected = std::max(expected, 0.0);
                        CHECK(std::abs(out[r * stride + o] - expected) <= 1e-6 * (10 + inputs));
                    }
                }
            }
        }
    }
}

// Rows from anywhere, for each of three taps.
void test_neighbours() {
    constexpr int rows = 29, taps = 3, inputs = 5, outputs = 21;
    const auto in = noise(rows * inputs), matrix = noise(outputs * taps * inputs);
    const Weights weights(matrix.data(), nullptr, outputs, taps * inputs);
    std::vector<const float*> pointers;
    for (int tap = 0; tap < taps; ++tap)
        for (int r = 0; r < rows; ++r) pointers.push_back(in.data() + (7 * r + 11 * tap) % rows * inputs);
    std::vector<float> out(rows * outputs);
    multiply(Neighbours{pointers.data(), rows, taps}, rows, weights,
             Store{out.data(), outputs, weights.bias(), Ending::plain, nullptr});
    for (int r = 0; r < rows; ++r) {
        for (int o = 0; o < outputs; ++o) {
            double expected = 0;
            for (int tap = 0; tap < taps; ++tap)
                for (int i = 0; i < inputs; ++i)
                    expected += double(pointers[tap * rows + r][i]) * matrix[(o * taps + tap) * inputs + i];
            CHECK(std::abs(out[r * outputs + o] - expected) <= 1e-5);
        }
    }
}

void test_add() {
    for (const auto& [rows, inputs, outputs] : examples()) {
        const auto in = noise(rows * inputs), matrix = noise(outputs * inputs);
        const int stride = outputs + 2;
        const auto before = noise(rows * stride);
        std::vector<float> out = before;
        const Weights weights(matrix.data(), nullptr, outputs, inputs);
        multiply(Inputs{in.data(), inputs}, rows, weights, Add{out.data(), stride, -1.0f});
        for (int r = 0; r < rows; ++r) {
            for (int o = 0; o < stride; ++o) {
                double expected = before[r * stride + o];  // beyond the outputs nothing may be written
                if (o < outputs) expected -= exact(in, inputs, matrix, inputs, r, o);
                CHECK(std::abs(out[r * stride + o] - expected) <= (o < outputs ? 1e-6 * (10 + inputs) : 0));
            }
        }
    }
}

void test_nan_and_infinity_pass() {
    const std::vector<float> in = {std::nanf(""), std::numeric_limits<float>::infinity()}, one = {1.0f};
    const Weights weights(one.data(), nullptr, 1, 1);
    std::vector<float> out(2 * weights.outputs());
    multiply(Inputs{in.data(), 1}, 2, weights,
             Store{out.data(), weights.outputs(), weights.bias(), Ending::relu, nullptr});
    CHECK(std::isnan(out[0]));
    CHECK(std::isinf(out[weights.outputs()]));
}

void test_a_row_does_not_depend_on_the_others() {
    constexpr int rows = 23, inputs = 50, outputs = 40;
    const auto in = noise(rows * inputs), matrix = noise(outputs * inputs);
    const Weights weights(matrix.data(), nullptr, outputs, inputs);
    const int width = weights.outputs();
    std::vector<float> all(rows * width), one(width);
    multiply(Inputs{in.data(), inputs}, rows, weights,
             Store{all.data(), width, weights.bias(), Ending::plain, nullptr});
    for (int r = 0; r < rows; ++r) {
        multiply(Inputs{in.data() + r * inputs, inputs}, 1, weights,
                 Store{one.data(), width, weights.bias(), Ending::plain, nullptr});
        for (int o = 0; o < outputs; ++o) CHECK(one[o] == all[r * width + o]);
    }
}

}  // namespace product_test

int test_product(int, char*[]) {
    using namespace product_test;
    for (most_lanes = 4; most_lanes <= 16; most_lanes *= 2) {
        test_store();
        test_long_sums();
        test_neighbours();
        test_add();
        test_nan_and_infinity_pass();
        test_a_row_does_not_depend_on_the_others();
    }
    return failures != 0;
}

#else
int test_product(int, char*[]) {
    return 0;
}
#endif
