#include <cmath>
#include <vector>

#include "check.hpp"
#include "convolution.hpp"
#include "noise.hpp"
#include "winograd_gradient.hpp"

#ifdef USF_PRODUCTS

using namespace usf;

namespace winograd_test {

// A layer against the sum over taps in float64; in memory with gaps between rows.
void test(const Maps& maps, int inputs, int outputs, bool relu, std::int64_t condition_images) {
    const auto matrix = noise(std::size_t{9} * inputs * outputs, 0.5f / std::sqrt(9.0f * inputs));
    const auto bias = noise(outputs, 0.3f), share = noise(condition_images * maps.positions() * outputs);
    const bool conditioned = condition_images > 0;
    const Layer layer(matrix.data(), bias.data(), outputs, 9 * inputs, relu, conditioned, 3, 3);
    CHECK((layer.filters() != nullptr) == (std::min(inputs, outputs) >= 16));
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

// With a kernel that is new: what small tiles find with one that is kept.
void test_new_kernel(const Maps& maps, int inputs, int outputs, int threads) {
    const auto matrix = noise(std::size_t{9} * inputs * outputs, 0.5f / std::sqrt(9.0f * inputs));
    const auto bias = noise(outputs, 0.3f), share = noise(maps.rows() * outputs),
               x = noise(maps.rows() * inputs);
    const Condition condition{share.data(), maps.images, outputs};
    const Call call{maps, threads, &condition};
    std::vector<float> expected(maps.rows() * outputs, NAN), found = expected;
    const Kernel kernel{matrix.data(), outputs, inputs, 9 * std::ptrdiff_t{inputs}, 1, inputs};
    apply(Winograd<2>(kernel, bias.data()), Ending::relu, Inputs{x.data(), inputs}, call, expected.data());
    convolution(kernel, bias.data(), Ending::relu, Inputs{x.data(), inputs}, call, found.data());
    CHECK(found == expected);
}

// Gradients of inputs and kernels, against sums over taps in float64; the first also where a mask is
// positive.
void test_gradients(const Maps& maps, int inputs, int outputs, int threads) {
    const auto kernel = noise(std::size_t{9} * inputs * outputs, 1 / std::sqrt(9.0f * outputs));
    const auto x = noise(maps.rows() * inputs), mask = noise(maps.rows() * inputs);
    const auto grad = noise(maps.rows() * outputs, 1 / std::sqrt(1.0f + maps.rows()));
    std::vector<double> of_x(x.size()), of_kernel(kernel.size());
    for (std::int64_t row = 0; row < maps.rows(); ++row) {
        const std::int64_t top = row / maps.width % maps.height, left = row % maps.width;
        for (int tap = 0; tap < 9; ++tap) {
            const std::int64_t dy = tap / 3 - 1, dx = tap % 3 - 1, from = row + dy * maps.width + dx;
            if (top + dy < 0 || top + dy >= maps.height || left + dx < 0 || left + dx >= maps.width) continue;
            for (int o = 0; o < outputs; ++o)
                for (int i = 0; i < inputs; ++i) {
                    const std::size_t at = (std::size_t{1} * o * inputs + i) * 9 + tap;
                    const double g = grad[row * outputs + o];
                    of_x[from * inputs + i] += g * kernel[at];
                    of_kernel[at] += g * x[from * inputs + i];
                }
        }
    }
    const Kernel forward{kernel.data(), outputs, inputs, 9 * std::ptrdiff_t{inputs}, 9, 1};
    const Condition beside{mask.data(), maps.images, inputs};
    std::vector<float> found(x.size(), NAN), masked = found, gradient(kernel.size(), NAN), again = gradient;
    const Inputs of_outputs{grad.data(), outputs};
    const Kernel back = forward.adjoint();
    convolution(back, nullptr, Ending::plain, of_outputs, Call{maps, threads}, found.data());
    convolution(back, nullptr, Ending::masked, of_outputs, Call{maps, threads, &beside}, masked.data());
    for (std::size_t i = 0; i < x.size(); ++i) {
        CHECK(std::abs(found[i] - of_x[i]) <= 4e-6);
        CHECK(masked[i] == (mask[i] > 0 ? found[i] : 0));
    }
    kernel_gradient({x.data(), inputs}, of_outputs, inputs, outputs, maps, threads, gradient.data());
    kernel_gradient({x.data(), inputs}, of_outputs, inputs, outputs, maps, threads, again.data());
    CHECK(gradient == again);
    for (std::size_t i = 0; i < kernel.size(); ++i) CHECK(std::abs(gradient[i] - of_kernel[i]) <= 1e-5);
}

// Values that are not finite stay near where they were, within tiles, and ReLU does not hide them.
void test_not_a_number(int side, int reach) {
    const int channels = 40;
    const auto matrix = noise(9 * channels * channels), bias = noise(channels);
    const Layer layer(matrix.data(), bias.data(), channels, 9 * channels, true, false, 3, 3);
    const Maps maps{1, side, side};
    std::vector<float> x = noise(maps.rows() * channels), y(maps.rows() * channels);
    x[(5 * side + 5) * channels + 7] = NAN;
    apply(layer, Inputs{x.data(), channels}, Call{maps, 1}, y.data());
    for (int row = 0; row < side * side; ++row) {
        const int far = std::max(std::abs(row / side - 5), std::abs(row % side - 5));
        if (far <= 1) CHECK(std::isnan(y[row * channels]));
        if (far > reach) CHECK(!std::isnan(y[row * channels]));
    }
}

// When tiles are large.
void test_choice() {
    const auto pay = [](int channels, const Maps& maps) {
        return Filters::large_tiles_pay({nullptr, channels, 100, 900, 1, 100}, maps);
    };
    CHECK(pay(32, {1, 9, 9}) && pay(32, {1, 12, 12}) && pay(32, {1, 4, 40}));
    CHECK(!pay(31, {1, 12, 12}) && !pay(32, {100, 8, 8}));  // few channels, few tiles in a map
    CHECK(!pay(32, {1, 1, 100}) && !pay(32, {1, 0, 100}));  // mostly outside of the map
}

}  // namespace winograd_test

int test_winograd(int, char*[]) {
    using namespace winograd_test;
    for (most_lanes = 4; most_lanes <= 16; most_lanes *= 2) {
        test({1, 8, 8}, 16, 16, false, 0);
        test({3, 7, 9}, 43, 37, true, 3);
        test({2, 16, 5}, 32, 64, true, 1);
        test({2, 1, 5}, 40, 20, false, 1);
        test({5, 6, 1}, 17, 16, true, 0);
        test({1, 1, 1}, 64, 48, false, 1);
        test({0, 3, 3}, 16, 16, false, 1);
        test({2, 3, 0}, 16, 16, false, 1);
        test({2, 0, 3}, 16, 16, false, 1);
        test({1, 40, 40}, 64, 32, true, 0);
        test({2, 5, 6}, 15, 30, true, 2);
        test_gradients({1, 8, 8}, 16, 16, 1);
        test_gradients({3, 7, 9}, 43, 37, 2);
        test_gradients({2, 1, 5}, 40, 20, 3);
        test_gradients({5, 6, 1}, 17, 80, 2);
        test_gradients({1, 1, 1}, 64, 48, 4);
        test_gradients({0, 3, 3}, 16, 16, 2);
        test_gradients({2, 3, 0}, 16, 16, 2);
        test_gradients({2, 0, 3}, 16, 16, 2);
        test_gradients({1, 40, 40}, 20, 33, 2);
        test_gradients({1, 40, 40}, 40, 33, 2);  // large tiles
        test_gradients({3, 21, 22}, 37, 50, 3);
        test_gradients({1, 8, 8}, 20, 100, 2);  // few tiles
        test_gradients({2, 5, 7}, 37, 150, 3);
        test_gradients({1, 23, 25}, 17, 100, 2);
        test_new_kernel({1, 40, 40}, 20, 40, 2);
        test_new_kernel({0, 3, 3}, 16, 130, 2);
        test_new_kernel({1, 8, 8}, 20, 130, 2);
        test_new_kernel({2, 5, 7}, 43, 200, 3);
        test({2, 9, 9}, 32, 40, false, 0);  // large tiles, with remainders of 1, 2 and 3 rows and columns
        test({1, 14, 15}, 43, 37, true, 1);
        test({2, 3, 41}, 37, 33, true, 2);
        test({1, 12, 12}, 300, 32, true, 0);
        test_not_a_number(8, 1);
        test_not_a_number(12, 3);
        test_choice();
    }
    return failures != 0;
}

#else
int test_winograd(int, char*[]) {
    return 0;
}
#endif
