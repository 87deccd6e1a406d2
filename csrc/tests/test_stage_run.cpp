#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "check.hpp"
#include "noise.hpp"
#include "stage_run.hpp"
#include "textbook.hpp"

#ifdef USF_PRODUCTS

using namespace usf;
using namespace usf::textbook;

namespace stage_run_test {

// Of a state of numbers around 1, in float32 or after products of numbers in bfloat16.
double tolerance(bool pairs) {
    return pairs ? 0.03 : 2e-5;
}

// Rows in bfloat16 give what the same numbers give as floats, rounded.
void test_in_bfloat16(const StageRun& run, const std::vector<float>& values, const Maps& maps,
                      const std::vector<Condition>& conditions) {
    std::vector<BFloat16> from(values.size()), to(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) narrow(values[i], from[i]);
    std::vector<float> state(values.size()), log_det(maps.rows()), expected(maps.rows());
    widen_to(from.data(), static_cast<std::int64_t>(from.size()), state.data());
    Condition condition = conditions[0];
    std::vector<BFloat16> share(condition.images * maps.positions() * condition.width);
    std::vector<float> widened(share.size());
    for (std::size_t i = 0; i < share.size(); ++i) {
        narrow(condition.data[i], share[i]);
        widened[i] = widen(share[i]);
    }
    condition.data = widened.data();
    run.run(state.data(), state.data(), maps, {condition, condition}, expected.data(), 1);
    condition.data = nullptr, condition.rounded = share.data();
    const std::vector<Condition> rounded{condition, condition};
    run.run(from.data(), to.data(), maps, rounded, log_det.data(), 2);
    CHECK(log_det == expected);
    for (std::size_t i = 0; i < state.size(); ++i) {
        BFloat16 nearest;
        narrow(state[i], nearest);
        CHECK(to[i].bits == nearest.bits);
    }
    run.run(from.data(), from.data(), maps, rounded, log_det.data(), 1);
    for (std::size_t i = 0; i < to.size(); ++i) CHECK(from[i].bits == to[i].bits);
}

// All kinds of stages, forward; then undone by a run of their inverses.
void test(const Case& c, bool pairs) {
    const std::int64_t rows = c.maps.rows();
    const int channels = c.channels, split = channels / 2, n = channels - split;
    std::vector<std::int64_t> order(channels);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_bits);
    std::vector<std::int64_t> passive(order.begin(), order.begin() + split),
        active(order.begin() + split, order.end());
    std::sort(passive.begin(), passive.end());
    std::sort(active.begin(), active.end());
    const Half passive_half(passive.data(), split, channels), active_half(active.data(), n, channels);

    const Plain first(split, c.hidden, true), shift(c.hidden, n, false);
    const Plain wide(split, c.hidden, true, c.kernel_height, c.kernel_width);
    const Plain both(c.hidden, 2 * n, false, c.kernel_height, c.kernel_width);
    const std::vector<float> offset = noise(n);
    const std::vector<float> share = noise(c.condition_images * c.maps.positions() * c.hidden);
    constexpr float clamp = 1.9f;
    const Conditioner additive{passive_half, {first.made(pairs, true), shift.made(pairs)}};
    const std::vector<float> seen_shift = noise(split);
    const Conditioner affine{passive_half, {wide.made(pairs, true), both.made(pairs)}, seen_shift};
    const Condition condition{share.data(), c.condition_images, c.hidden};
    const std::vector<Condition> conditions(2, condition);

    StageRun forward(channels), inverse(channels);
    forward.add(Affine{affine, active_half, offset, clamp, false});
    forward.add(Additive{additive, active_half, 1});
    inverse.add(Additive{additive, active_half, -1});
    inverse.add(Affine{affine, active_half, offset, clamp, true});

    const std::vector<float> before = noise(rows * channels);
    std::vector<float> state(before.size()), log_det(rows, 0.5f);
    forward.run(before.data(), state.data(), c.maps, conditions, log_det.data(), 1);

    Wide x(before.begin(), before.end());
    Wide seen = columns(x, passive, channels);
    for (std::size_t i = 0; i < seen.size(); ++i) seen[i] += seen_shift[i % split];
    const Wide scales = both.of(wide.of(seen, c.maps, &condition), c.maps);
    const Wide shifts = shift.of(first.of(columns(x, passive, channels), c.maps, &condition), c.maps);
    for (std::int64_t r = 0; r < rows; ++r) {
        double total = 0.5;
        for (int j = 0; j < n; ++j) {
            double& value = x[r * channels + active[j]];
            const double s = clamp * std::tanh(scales[r * 2 * n + j]);
            value = (value + offset[j]) * std::exp(s) + scales[r * 2 * n + n + j] + shifts[r * n + j];
            total += s;
        }
        CHECK(std::abs(log_det[r] - total) <= tolerance(pairs) / 2 * (1 + n));
    }
    for (std::size_t i = 0; i < x.size(); ++i)
        CHECK(std::abs(state[i] - x[i]) <= tolerance(pairs) * (1 + std::abs(x[i])));

    std::vector<float> again = before, log_det_again(rows, 0.5f);
    forward.run(again.data(), again.data(), c.maps, conditions, log_det_again.data(), 3);
    CHECK(again == state);
    CHECK(log_det_again == log_det);
    if (pairs) test_in_bfloat16(forward, before, c.maps, conditions);
    inverse.run(state.data(), state.data(), c.maps, conditions, log_det.data(), 1);
    for (std::size_t i = 0; i < state.size(); ++i)
        CHECK(std::abs(state[i] - before[i]) <= 1e-3 * (1 + std::abs(before[i])));
    for (const float value : log_det) CHECK(std::abs(value - 0.5f) <= 1e-5f);
}

// A shift, a product, a residual block that sees all channels, another order, other channels in place of
// some.
void test_residual(const Case& c, bool pairs) {
    const int channels = c.channels;
    const Plain map(channels, channels, false),
        enter(channels, c.hidden, true, c.kernel_height, c.kernel_width), leave(c.hidden, channels, false);
    StageRun run(channels);
    const std::vector<float> offset = noise(channels);
    run.add(Shift{offset});
    run.add(Product{map.made(pairs).weights()});
    run.add(Residual{{{}, {enter.made(pairs)}}, leave.made(pairs).weights(), -1});
    std::vector<std::int64_t> index(channels);
    std::iota(index.begin(), index.end(), 0);
    std::shuffle(index.begin(), index.end(), random_bits);
    const std::vector<float> scale = noise(channels), bias = noise(channels);
    run.add(Reorder{index, scale, bias});
    std::vector<std::int64_t> going;
    for (int j = 0; j < channels; j += 3) going.push_back(j);
    const auto count = static_cast<int>(going.size());
    const Plain come(channels, count, false);
    run.add(Exchange{come.made(pairs).weights(), Half(going.data(), count, channels)});
    const std::vector<float> before = noise(c.maps.rows() * channels);
    std::vector<float> state = before;
    run.run(state.data(), state.data(), c.maps, {}, nullptr, 2);

    Wide shifted(before.begin(), before.end());
    for (std::size_t i = 0; i < shifted.size(); ++i) shifted[i] += offset[i % channels];
    const Wide mapped = map.of(shifted, c.maps);
    const Wide left = leave.of(enter.of(mapped, c.maps), c.maps);
    Wide expected(mapped.size());
    for (std::int64_t r = 0; r < c.maps.rows(); ++r)
        for (int j = 0; j < channels; ++j) {
            const std::int64_t from =
                r * channels + index[j];  // the last layer's bias is not for residual blocks
            expected[r * channels + j] =
                scale[j] * (mapped[from] - (left[from] - leave.bias[index[j]])) + bias[j];
        }
    const Wide came = come.of(expected, c.maps);
    for (std::int64_t r = 0; r < c.maps.rows(); ++r)
        for (int j = 0; j < count; ++j) expected[r * channels + going[j]] = came[r * count + j];
    for (std::size_t i = 0; i < expected.size(); ++i)
        CHECK(std::abs(state[i] - expected[i]) <= tolerance(pairs) * (1 + std::abs(expected[i])));
}

// A coupling by one convolution that a condition is added to: of numbers that are rounded and then exact,
// too.
void test_convolution(const Maps& maps, int kernel_height, int kernel_width, int inputs, int outputs) {
    const int channels = inputs + outputs, taps = kernel_height * kernel_width;
    const auto rows = static_cast<int>(maps.rows());
    const auto before = noise(rows * channels), matrix = noise(outputs * taps * inputs);
    const auto bias = noise(outputs), share = noise(maps.positions() * outputs);
    std::vector<std::int64_t> index(channels);
    std::iota(index.begin(), index.end(), 0);
    const Layer layer(matrix.data(), bias.data(), outputs, taps * inputs, false, true, kernel_height,
                      kernel_width, true);
    CHECK(layer.takes_words());
    StageRun run(channels);
    run.add(Additive{
        {Half(index.data(), inputs, channels), {layer}}, Half(index.data() + inputs, outputs, channels), 1});
    std::vector<float> state(before.size());
    run.run(before.data(), state.data(), maps, {{share.data(), 1, outputs}}, nullptr, 2);
    for (int r = 0; r < rows; ++r) {
        const std::int64_t y = r / maps.width % maps.height, x = r % maps.width;
        for (int o = 0; o < outputs; ++o) {
            double expected = before[r * channels + inputs + o] + bias[o];
            expected += share[r % maps.positions() * outputs + o];
            for (int tap = 0; tap < taps; ++tap) {
                const std::int64_t dy = tap / kernel_width - kernel_height / 2,
                                   dx = tap % kernel_width - kernel_width / 2;
                if (y + dy < 0 || y + dy >= maps.height || x + dx < 0 || x + dx >= maps.width) continue;
                const float* const from = before.data() + (r + dy * maps.width + dx) * channels;
                for (int i = 0; i < inputs; ++i)
                    expected += double(rounded(from[i])) * rounded(matrix[(o * taps + tap) * inputs + i]);
            }
            CHECK(std::abs(state[r * channels + inputs + o] - expected) <= 1e-6 * (10 + taps * inputs));
        }
    }
}

// With no stages at all.
void test_nothing_to_do() {
    const std::vector<float> before = noise(7 * 3);
    std::vector<float> state(before.size());
    StageRun(3).run(before.data(), state.data(), {1, 1, 7}, {}, nullptr, 2);
    CHECK(state == before);
}

// Stages that would read or write memory of others.
void test_sizes() {
    const std::int64_t order[] = {0, 1, 2, 3, 4};
    const Half two(order, 2, 5), three(order + 2, 3, 5);
    const auto linear = [](int inputs, int outputs) { return Plain(inputs, outputs, false).made(false); };
    const Plain wide(2, 4, false, 3, 3);
    StageRun run(5);
    run.add(Additive{{two, {linear(2, 7), linear(7, 3)}}, three, 1});
    CHECK_THROWS(run.add(Additive{{two, {linear(2, 7), linear(7, 1)}}, three, 1}));
    CHECK_THROWS(run.add(Additive{{two, {linear(2, 7), linear(6, 3)}}, three, 1}));
    CHECK_THROWS(run.add(Additive{{two, {linear(5, 3)}}, three, 1}));
    CHECK_THROWS(run.add(Additive{{two, {linear(2, 3)}, noise(3)}, three, 1}));
    CHECK_THROWS(run.add(Additive{{two, {wide.made(false)}}, three, 1}));
    CHECK_THROWS(run.add(Affine{{two, {linear(2, 3)}}, three, noise(3), 1.9f, false}));
    CHECK_THROWS(run.add(Affine{{two, {linear(2, 6)}}, three, noise(2), 1.9f, false}));
    CHECK_THROWS(run.add(Product{linear(5, 4).weights()}));
    CHECK_THROWS(run.add(Exchange{linear(5, 2).weights(), three}));
    CHECK_THROWS(run.add(Residual{{{}, {linear(5, 4)}}, linear(3, 5).weights(), 1}));
    CHECK_THROWS(run.add(Residual{{{}, {linear(5, 4)}}, linear(4, 4).weights(), 1}));
}

}  // namespace stage_run_test

int test_stage_run(int, char*[]) {
    using namespace stage_run_test;
    for (const std::int64_t numbers : {numbers_together, std::int64_t{1}}) {
        numbers_together = numbers;
        for (const Case& c : cases) {
            test(c, false);
            test_residual(c, false);
            if (!multiplies_pairs()) continue;
            test(c, true);
            test_residual(c, true);
        }
    }
    test_nothing_to_do();
    test_sizes();
    if (has_amx()) {
        for (const int channels : {1, 16, 33, 70})
            for (const int side : {1, 2, 7, 20}) test_convolution({2, side, side + 1}, 3, 3, channels, 20);
        test_convolution({3, 1, 50}, 1, 5, 40, 33);
        test_convolution({2, 9, 4}, 5, 3, 12, 64);
        test_convolution({2, 6, 8}, 7, 1, 32, 8);
        test_convolution({0, 4, 4}, 3, 3, 32, 8);
        test_convolution({2, 6, 0}, 3, 1, 32, 8);
    }
    return failures != 0;
}

#else
int test_stage_run(int, char*[]) {
    return 0;
}
#endif
