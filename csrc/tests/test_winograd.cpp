#include <cmath>
#include <vector>

#include "check.hpp"
#include "layer.hpp"
#include "noise.hpp"

#ifdef USF_PRODUCTS

using namespace usf;

namespace {

// Against the sum over taps in float64, and the layer by products of taps; in memory with gaps between rows.
void test(const Maps& maps, int inputs, int outputs, bool relu, std::int64_t condition_images) {
    const auto matrix = noise(std::size_t{9} * inputs * outputs, 0.5f / std::sqrt(9.0f * inputs));
    const auto bias = noise(outputs, 0.3f), share = noise(condition_images * maps.positions() * outputs);
    const bool conditioned = condition_images > 0;
    const Layer layer(matrix.data(), bias.data(), outputs, 9 * inputs, relu, conditioned, 3, 3);
    CHECK((layer.winograd() != nullptr) == (std::min(inputs, outputs) >= 16));
    CHECK(layer.outputs() == outputs);
    const int stride = inputs + 3;
    const auto x = noise(maps.rows() * stride);
    const Condition condition{share.data(), condition_images, outputs};
    std::vector<float> y(maps.rows() * outputs, NAN), again = y;
    apply(layer, Inputs{x.data(), stride}, Call{maps, 1, &condition}, y.data());
    apply(layer, Inputs{x.data(), stride}, Call{maps, 3, &condition}, again.data());
    CHECK(again == y);
    for (std::int64_t row = 0; row < maps.rows(); ++row) {
        const std::int64_t top = row / maps.width % maps.height, left = row % maps.width;
        for (int o = 0; o < outputs; ++o) {
            double expected = bias[o];
            if (conditioned)
                expected += share[(condition_images == 1 ? row % maps.positions() : row) * outputs + o];
            for (int tap = 0; tap < 9; ++tap) {
                const std::int64_t dy = tap / 3 - 1, dx = tap % 3 - 1;
                if (top + dy < 0 || top + dy >= maps.height || left + dx < 0 || left + dx >= maps.width)
                    continue;
                const float* const from = x.data() + (row + dy * maps.width + dx) * stride;
                const float* const weight = matrix.data() + (std::size_t{9} * o + tap) * inputs;
                for (int i = 0; i < inputs; ++i) expected += double(weight[i]) * from[i];
            }
            if (relu) expected = std::max(expected, 0.0);
            CHECK(std::abs(y[row * outputs + o] - expected) <= 4e-6);
        }
    }
}

// Values that are not finite stay near where they were, and ReLU does not hide them.
void test_not_a_number() {
    const int channels = 20;
    const auto matrix = noise(9 * channels * channels), bias = noise(channels);
    const Layer layer(matrix.data(), bias.data(), channels, 9 * channels, true, false, 3, 3);
    const Maps maps{1, 12, 12};
    std::vector<float> x = noise(maps.rows() * channels), y(maps.rows() * channels);
    x[(5 * 12 + 5) * channels + 7] = NAN;
    apply(layer, Inputs{x.data(), channels}, Call{maps, 1}, y.data());
    for (int row = 0; row < 144; ++row) {
        const int far = std::max(std::abs(row / 12 - 5), std::abs(row % 12 - 5));
        if (far <= 1) CHECK(std::isnan(y[row * channels]));
        if (far > 2) CHECK(!std::isnan(y[row * channels]));
    }
}

}  // namespace

int main() {
    test({1, 8, 8}, 16, 16, false, 0);
    test({3, 7, 9}, 43, 37, true, 3);
    test({2, 16, 5}, 32, 64, true, 1);
    test({2, 1, 5}, 40, 20, false, 1);
    test({5, 6, 1}, 17, 16, true, 0);
    test({1, 1, 1}, 64, 48, false, 1);
    test({0, 3, 3}, 16, 16, false, 1);
    test({1, 40, 40}, 64, 32, true, 0);
    test({2, 5, 6}, 15, 30, true, 2);
    test_not_a_number();
    return failures != 0;
}

#else
int main() {}
#endif
