#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "pointwise_run.hpp"

#ifdef USF_PRODUCTS

using namespace usf;

namespace {

int failures = 0;

void that(bool holds, const char* what, int line) {
    if (holds) return;
    std::printf("line %d: %s\n", line, what);
    ++failures;
}
#define CHECK(condition) that(condition, #condition, __LINE__)

std::mt19937 random_bits(0);

std::vector<float> noise(std::size_t size, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> values(size);
    for (float& value : values) value = normal(random_bits);
    return values;
}

// A layer in C++ and in float64, row by row.
struct Layer {
    int inputs, outputs;
    bool relu;
    std::vector<float> matrix, bias;

    Layer(int in, int out, bool with_relu)
        : inputs(in), outputs(out), relu(with_relu), matrix(noise(in * out, 0.3f)), bias(noise(out, 0.3f)) {}

    PointwiseLayer made(bool conditioned) const {
        return {Weights(matrix.data(), bias.data(), outputs, inputs), relu, conditioned};
    }
    std::vector<double> of(const std::vector<double>& x, const float* condition) const {
        std::vector<double> y(outputs);
        for (int o = 0; o < outputs; ++o) {
            y[o] = bias[o] + (condition ? condition[o] : 0.0f);
            for (int i = 0; i < inputs; ++i) y[o] += double(matrix[o * inputs + i]) * x[i];
            if (relu) y[o] = std::max(y[o], 0.0);
        }
        return y;
    }
};

// All kinds of stages in one run, forward; then undone by a run of the inverses.
void test(int channels, int hidden, std::int64_t images, std::int64_t positions,
          std::int64_t condition_images) {
    const std::int64_t rows = images * positions;
    std::vector<std::int64_t> order(channels);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_bits);
    const int split = channels / 2;
    std::vector<std::int64_t> passive(order.begin(), order.begin() + split),
        active(order.begin() + split, order.end());
    std::sort(passive.begin(), passive.end());
    std::sort(active.begin(), active.end());
    const int n = channels - split;
    const Half passive_half(passive.data(), split, channels), active_half(active.data(), n, channels);

    const Layer first(split, hidden, true), shift(hidden, n, false), both(hidden, 2 * n, false);
    const std::vector<float> offset = noise(n), condition = noise(condition_images * positions * hidden);
    constexpr float clamp = 1.9f;
    const PointwiseConditioner additive{passive_half, {first.made(true), shift.made(false)}};
    const PointwiseConditioner affine{passive_half, {first.made(true), both.made(false)}};
    const std::vector<Condition> conditions(2, {condition.data(), condition_images, hidden});

    PointwiseRun forward(channels), inverse(channels);
    forward.add(PointwiseAdditive{additive, active_half, 1});
    forward.add(PointwiseAffine{affine, active_half, offset, clamp, false});
    inverse.add(PointwiseAffine{affine, active_half, offset, clamp, true});
    inverse.add(PointwiseAdditive{additive, active_half, -1});

    const std::vector<float> before = noise(rows * channels);
    std::vector<float> state(before.size()), log_det(rows, 0.5f);
    forward.run(before.data(), state.data(), rows, positions, conditions, log_det.data(), 1);
    for (std::int64_t r = 0; r < rows; ++r) {
        std::vector<double> x(before.begin() + r * channels, before.begin() + (r + 1) * channels), seen;
        for (const std::int64_t i : passive) seen.push_back(x[i]);
        const float* share = condition.data() + (condition_images == 1 ? r % positions : r) * hidden;
        const auto units = first.of(seen, share), shifts = shift.of(units, nullptr),
                   pairs = both.of(units, nullptr);
        double total = 0.5;
        for (int j = 0; j < n; ++j) {
            const double s = clamp * std::tanh(pairs[j]);
            x[active[j]] = (x[active[j]] + shifts[j] + offset[j]) * std::exp(s) + pairs[n + j];
            total += s;
        }
        for (int c = 0; c < channels; ++c)
            CHECK(std::abs(state[r * channels + c] - x[c]) <= 2e-5 * (1 + std::abs(x[c])));
        CHECK(std::abs(log_det[r] - total) <= 1e-5 * (1 + n));
    }
    std::vector<float> again = before, log_det_again(rows, 0.5f);
    forward.run(again.data(), again.data(), rows, positions, conditions, log_det_again.data(), 3);
    CHECK(again == state);
    CHECK(log_det_again == log_det);
    inverse.run(state.data(), state.data(), rows, positions, conditions, log_det.data(), 1);
    for (std::size_t i = 0; i < state.size(); ++i)
        CHECK(std::abs(state[i] - before[i]) <= 1e-3 * (1 + std::abs(before[i])));
    for (const float value : log_det) CHECK(std::abs(value - 0.5f) <= 1e-5f);
}

// A product, a residual block that sees all channels, another order.
void test_residual(int channels, std::int64_t rows) {
    const Layer map(channels, channels, false), enter(channels, 9, true), leave(9, channels, false);
    PointwiseRun run(channels);
    run.add(PointwiseProduct{map.made(false).weights});
    run.add(PointwiseResidual{{{}, {enter.made(false)}}, leave.made(false).weights, -1});
    std::vector<std::int32_t> index(channels);
    std::iota(index.begin(), index.end(), 0);
    std::shuffle(index.begin(), index.end(), random_bits);
    const std::vector<float> scale = noise(channels), bias = noise(channels);
    run.add(PointwiseReorder{index, scale, bias});
    const std::vector<float> before = noise(rows * channels);
    std::vector<float> state = before;
    run.run(state.data(), state.data(), rows, rows, {}, nullptr, 2);
    for (std::int64_t r = 0; r < rows; ++r) {
        const std::vector<double> x(before.begin() + r * channels, before.begin() + (r + 1) * channels);
        const auto mapped = map.of(x, nullptr), left = leave.of(enter.of(mapped, nullptr), nullptr);
        for (int c = 0; c < channels; ++c) {
            const int from = index[c];  // the last layer's bias is not for residual blocks
            const double expected = scale[c] * (mapped[from] - (left[from] - leave.bias[from])) + bias[c];
            CHECK(std::abs(state[r * channels + c] - expected) <= 2e-5 * (1 + std::abs(expected)));
        }
    }
}

}  // namespace

int main() {
    test(8, 5, 1, 1, 1);
    test(7, 12, 3, 50, 1);
    test(33, 40, 2, 301, 2);
    test(64, 64, 5, 100, 1);
    test(2, 3, 4, 7, 4);
    test(16, 16, 0, 4, 1);
    for (const std::int64_t rows : {1, 12, 13, 700})
        for (const int channels : {1, 5, 32, 100}) test_residual(channels, rows);
    return failures != 0;
}

#else
int main() {}
#endif
