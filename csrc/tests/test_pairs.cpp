#include <cmath>
#include <limits>
#include <vector>

#include "check.hpp"
#include "layer.hpp"
#include "noise.hpp"

#ifdef USF_PRODUCTS

using namespace usf;

namespace pairs_test {

// Products of numbers that bfloat16 holds are exact in float32: what is left are the roundings of sums.
void test_products(int rows, int inputs, int outputs) {
    const int stride = inputs + 3;
    const auto in = noise(rows * stride), matrix = noise(outputs * inputs), bias = noise(outputs);
    const Weights weights(matrix.data(), bias.data(), outputs, inputs, true);
    std::vector<float> out(rows * outputs, std::numeric_limits<float>::quiet_NaN());
    Floats scratch;
    multiply(Inputs{in.data(), stride}, rows, weights,
             Store{out.data(), outputs, weights.bias(), Ending::plain, nullptr}, scratch);
    for (int r = 0; r < rows; ++r)
        for (int o = 0; o < outputs; ++o) {
            double expected = bias[o];
            for (int i = 0; i < inputs; ++i)
                expected += double(rounded(in[r * stride + i])) * rounded(matrix[o * inputs + i]);
            CHECK(std::abs(out[r * outputs + o] - expected) <= 1e-6 * (10 + inputs));
        }
}

// Against the same convolution in float32: going to points takes sums of numbers, and so of their roundings.
void test_convolution(int inputs, int outputs, int height, int width) {
    const Maps maps{2, height, width};
    const auto rows = static_cast<int>(maps.rows());
    const auto in = noise(rows * inputs), matrix = noise(outputs * 9 * inputs), bias = noise(outputs);
    std::vector<float> found[2];
    for (const bool pairs : {false, true}) {
        const Layer layer(matrix.data(), bias.data(), outputs, 9 * inputs, false, false, 3, 3, pairs);
        CHECK(layer.filters() && layer.filters()->pairs() == pairs);
        found[pairs].assign(rows * outputs, std::numeric_limits<float>::quiet_NaN());
        apply(layer, Inputs{in.data(), inputs}, Call{maps, 2}, found[pairs].data());
    }
    double squares = 0, errors = 0;
    for (std::size_t i = 0; i < found[0].size(); ++i) {
        squares += std::pow(found[0][i], 2);
        errors += std::pow(found[1][i] - found[0][i], 2);
    }
    CHECK(errors > 0);
    CHECK(std::sqrt(errors / squares) <= std::ldexp(1.25, -8));
}

void test_rounding() {
    const float nan = std::numeric_limits<float>::quiet_NaN(), huge = std::numeric_limits<float>::infinity();
    std::vector<float> from = noise(37);
    from[0] = nan, from[1] = huge, from[2] = -huge, from[3] = 1.00390625f, from[4] = 1.01171875f;
    std::vector<float> to(words_of(37));
    round_rows(from.data(), 37, 1, 37, to.data());
    std::vector<BFloat16> out(2 * to.size());
    std::memcpy(out.data(), to.data(), sizeof(float) * to.size());
    CHECK(std::isnan(widen(out[0])));
    for (int i = 1; i < 37; ++i) CHECK(widen(out[i]) == rounded(from[i]));  // ties to even, too
    for (std::size_t i = 37; i < out.size(); ++i) CHECK(out[i].bits == 0);
}

}  // namespace pairs_test

int test_pairs(int, char*[]) {
    using namespace pairs_test;
    if (!multiplies_pairs()) return 0;
    for (const bool amx : {false, true}) {
        may_use_amx = amx;
        test_rounding();
        for (int rows = 0; rows <= 70; ++rows) test_products(rows, 7, 33);
        for (const int inputs : {1, 2, 3, 129, 512, 513, 1600}) test_products(45, inputs, 40);
        for (const int outputs : {1, 15, 16, 17, 32, 100}) test_products(45, 20, outputs);
        for (const int inputs : {16, 17, 33, 64})
            for (const int side : {1, 2, 5, 8})
                if (!amx) test_convolution(inputs, 48, side, side + 1);
    }
    return failures != 0;
}

#else

int test_pairs(int, char*[]) {
    return 0;
}

#endif
