#include <cmath>
#include <vector>

#include "check.hpp"
#include "factor.hpp"
#include "noise.hpp"

#ifdef USF_PRODUCTS

using namespace usf;

namespace factor_test {

// Of maps and of rows, against sums in float64; the matrix has gaps, and NaN where it is not to be read.
void test(int channels, std::int64_t images, std::int64_t positions, bool stored_upper, bool transposed,
          bool diagonal, int threads) {
    const std::int64_t stride = channels + 3;
    auto matrix = noise(channels * stride, 1 / std::sqrt(float(channels)));
    const auto own = noise(channels), bias = noise(channels);
    std::vector<double> factor(std::size_t{1} * channels * channels, 0.0);
    for (int i = 0; i < channels; ++i)
        for (int j = 0; j < channels; ++j) {
            double& value = factor[transposed ? j * channels + i : i * channels + j];
            if (i == j)
                value = diagonal ? own[i] : 1;
            else if (stored_upper == (j > i))
                value = matrix[i * stride + j];
            if (i == j || stored_upper != (j > i)) matrix[i * stride + j] = NAN;
        }
    const Factor found{{matrix.data(), stride, transposed},
                       stored_upper != transposed,
                       diagonal ? own.data() : nullptr,
                       channels};
    const std::int64_t map = positions + 2, image = channels * map + 1, row = channels + 5;
    const auto x = noise(images * image);
    std::vector<float> rows(images * positions * row, NAN);
    for (std::int64_t b = 0; b < images; ++b)
        for (std::int64_t p = 0; p < positions; ++p)
            for (int c = 0; c < channels; ++c)
                rows[(b * positions + p) * row + c] = x[b * image + c * map + p];
    std::vector<float> of_maps(images * channels * positions, NAN), of_rows = of_maps;
    factor_maps(found, nullptr, {x.data(), image, map}, images, positions, of_maps.data(), threads);
    factor_rows(found, bias.data(), {rows.data(), row}, images * positions, of_rows.data(), threads);
    for (std::int64_t b = 0; b < images; ++b)
        for (std::int64_t p = 0; p < positions; ++p)
            for (int o = 0; o < channels; ++o) {
                double sum = 0, size = 1;  // rounding errors grow with what is added up
                for (int c = 0; c < channels; ++c) {
                    const double term = factor[o * channels + c] * x[b * image + c * map + p];
                    sum += term, size += std::abs(term);
                }
                CHECK(std::abs(of_maps[(b * channels + o) * positions + p] - sum) <= 1e-6 * size);
                CHECK(std::abs(of_rows[(b * positions + p) * channels + o] - sum - bias[o]) <= 1e-6 * size);
            }
}

}  // namespace factor_test

int test_factor(int, char*[]) {
    using namespace factor_test;
    for (most_lanes = 4; most_lanes <= 16; most_lanes *= 2)
        for (const bool upper : {false, true})
            for (const bool transposed : {false, true}) {
                test(1, 1, 1, upper, transposed, true, 1);
                test(7, 2, 3, upper, transposed, false, 2);
                test(48, 1, 40, upper, transposed, true, 2);
                test(131, 2, 37, upper, transposed, upper, 2);
                test(50, 0, 5, upper, transposed, true, 2);
                test(50, 2, 0, upper, transposed, true, 2);
            }
    test(300, 1, 700, true, false, true, 2);  // more rows than stay in the cache
    return failures != 0;
}

#else
int test_factor(int, char*[]) {
    return 0;
}
#endif
