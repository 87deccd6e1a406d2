#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "check.hpp"
#include "coupling_gradients.hpp"
#include "noise.hpp"
#include "norms.hpp"

using namespace usf;

namespace couplings_test {

// Features in memory of their own, either way around.
struct Memory {
    std::vector<float> values;
    Features<float> features;

    Memory(std::vector<float> from, const Extent& e, std::int64_t channels, bool rows)
        : values(std::move(from)),
          features{values.data(), channels * e.positions, rows ? 1 : e.positions, rows ? channels : 1} {}
    Memory(const Memory&) = delete;
    Input input() const { return {features.data, features.batch, features.channel, features.position}; }
    double at(std::int64_t b, std::int64_t c, std::int64_t p) const { return *features.at(b, c, p); }
};

bool near(double actual, double expected) {
    return std::abs(actual - expected) <= 1e-5 * (1 + std::abs(expected));
}

Exit make_exit(std::int64_t channels, bool permutes, const float* scale, const float* bias) {
    Exit exit{{}, scale, scale ? bias : nullptr};
    if (permutes) {
        exit.to.resize(channels);
        std::iota(exit.to.begin(), exit.to.end(), 0);
        std::shuffle(exit.to.begin(), exit.to.end(), random_bits);
    }
    return exit;
}

void check_coupling(const Extent& e, std::int64_t split, const Coupling& coupling, bool rows, bool permutes,
                    bool scales) {
    const std::int64_t active = e.channels - split, outputs = (coupling.affine() ? 2 : 1) * active;
    const std::int64_t size = e.batch * e.channels * e.positions,
                       params_size = e.batch * outputs * e.positions;
    const Memory x(noise(size), e, e.channels, rows), grad_y(noise(size), e, e.channels, rows);
    const Memory params(noise(params_size, 4), e, outputs, rows);
    Memory y(std::vector<float>(size, NAN), e, e.channels, rows);
    Memory grad_x(std::vector<float>(size, NAN), e, e.channels, rows);
    Memory grad_params(std::vector<float>(params_size, NAN), e, outputs, rows);
    std::vector<float> log_det(e.batch, NAN), grad_scale(e.channels, NAN), grad_bias(e.channels, NAN);
    const std::vector<float> scale = noise(e.channels), bias = noise(e.channels),
                             grad_log_det = noise(e.batch);
    const Exit exit = make_exit(e.channels, permutes, scales ? scale.data() : nullptr, bias.data());
    CHECK(couple(coupling, split, exit, x.input(), params.input(), e, y.features, log_det.data(), 2));
    CHECK(couple_gradient(coupling, split, exit, grad_y.input(), grad_log_det.data(), x.input(),
                          params.input(), e, grad_x.features, grad_params.features, grad_scale.data(),
                          grad_bias.data(), 2));
    const double sign = coupling.inverse ? -1 : 1;
    std::vector<double> scale_sums(e.channels), bias_sums(e.channels);
    for (std::int64_t b = 0; b < e.batch; ++b) {
        double total = 0;
        for (std::int64_t j = 0; j < e.channels; ++j) {
            const std::int64_t to = exit.channel(j);
            for (std::int64_t p = 0; p < e.positions; ++p) {
                const double value = x.at(b, j, p), gradient = grad_y.at(b, to, p) * (scales ? scale[j] : 1);
                double coupled = value, to_x = gradient;
                if (j >= split) {
                    const double raw = params.at(b, j - split, p);
                    double to_raw = sign * gradient;
                    if (!coupling.affine()) {
                        coupled += sign * raw;
                    } else {
                        const double tanh = std::tanh(0.1 * raw), s = coupling.clamp * tanh;
                        const double t = 0.1 * params.at(b, j - split + active, p);
                        coupled = coupling.inverse ? (value - t) * std::exp(-s) : value * std::exp(s) + t;
                        to_x = gradient * std::exp(sign * s);
                        const double to_shift = 0.1 * (coupling.inverse ? -to_x : gradient);
                        const double to_s =
                            sign * (to_x * (coupling.inverse ? value - t : value) + grad_log_det[b]);
                        to_raw = to_s * coupling.clamp * 0.1 * (1 - tanh * tanh);
                        CHECK(near(grad_params.at(b, j - split + active, p), to_shift));
                        total += sign * s;
                    }
                    CHECK(near(grad_params.at(b, j - split, p), to_raw));
                }
                CHECK(near(y.at(b, to, p), scales ? scale[j] * coupled + bias[j] : coupled));
                CHECK(near(grad_x.at(b, j, p), to_x));
                scale_sums[j] += coupled * grad_y.at(b, to, p);
                bias_sums[j] += grad_y.at(b, to, p);
            }
        }
        if (coupling.affine()) CHECK(near(log_det[b], total));
    }
    for (std::int64_t c = 0; scales && c < e.channels; ++c) {
        const double allowed = 1e-5 * (1 + static_cast<double>(e.batch * e.positions));
        CHECK(std::abs(grad_scale[c] - scale_sums[c]) < allowed);
        CHECK(std::abs(grad_bias[c] - bias_sums[c]) < allowed);
    }
}

// In place where there is no exit.
void check_undo(const Extent& e, std::int64_t split, const Coupling& coupling, bool rows, bool permutes,
                bool scales) {
    const std::int64_t outputs = (coupling.affine() ? 2 : 1) * (e.channels - split),
                       size = e.batch * e.channels * e.positions;
    const Memory x(noise(size), e, e.channels, rows), grad_y(noise(size), e, e.channels, rows);
    const Memory params(noise(e.batch * outputs * e.positions, 4), e, outputs, rows);
    const std::vector<float> nothing(size, NAN), grad_log_det = noise(e.batch), bias = noise(e.channels);
    std::vector<float> scale = noise(e.channels), log_det(e.batch);
    for (float& value : scale) value = std::copysign(0.5f + std::abs(value), value);
    const Exit exit = make_exit(e.channels, permutes, scales ? scale.data() : nullptr, bias.data());

    Memory y(nothing, e, e.channels, rows), expected(nothing, e, e.channels, rows);
    Memory expected_params(params.values, e, outputs, rows);
    std::vector<float> expected_scale(e.channels), expected_bias(e.channels);
    CHECK(couple(coupling, split, exit, x.input(), params.input(), e, y.features, log_det.data(), 1));
    CHECK(couple_gradient(coupling, split, exit, grad_y.input(), grad_log_det.data(), x.input(),
                          params.input(), e, expected.features, expected_params.features,
                          expected_scale.data(), expected_bias.data(), 1));

    const bool in_place = exit.nothing();
    Memory found(in_place ? y.values : nothing, e, e.channels, rows);
    Memory grad(in_place ? grad_y.values : nothing, e, e.channels, rows);
    Memory grad_params(params.values, e, outputs, rows);
    std::vector<float> grad_scale(e.channels, NAN), grad_bias(e.channels, NAN);
    CHECK(uncouple(coupling, split, exit, in_place ? found.input() : y.input(),
                   in_place ? grad.input() : grad_y.input(), params.input(), grad_log_det.data(), e,
                   found.features, grad.features, grad_params.features, grad_scale.data(), grad_bias.data(),
                   2));
    for (std::size_t i = 0; i < x.values.size(); ++i) {
        CHECK(std::abs(found.values[i] - x.values[i]) < 1e-4);
        CHECK(near(grad.values[i], expected.values[i]));
    }
    for (std::size_t i = 0; i < grad_params.values.size(); ++i)
        CHECK(std::abs(grad_params.values[i] - expected_params.values[i]) <
              1e-4 * (1 + std::abs(expected_params.values[i])));
    const double allowed = 1e-5 * (1 + static_cast<double>(e.batch * e.positions));
    for (std::int64_t c = 0; scales && c < e.channels; ++c) {
        CHECK(std::abs(grad_scale[c] - expected_scale[c]) < allowed);
        CHECK(std::abs(grad_bias[c] - expected_bias[c]) < allowed);
    }
}

void check_norms(const Extent& e, bool rows) {
    const Memory z(noise(e.batch * e.channels * e.positions), e, e.channels, rows);
    Memory out(std::vector<float>(z.values.size(), NAN), e, e.channels, rows);
    std::vector<float> norms(e.batch * e.positions, NAN);
    const std::vector<float> grad = noise(norms.size());
    CHECK(squared_norm(z.input(), e, norms.data(), 2));
    CHECK(squared_norm_gradient(grad.data(), z.input(), e, out.features, 2));
    for (std::int64_t b = 0; b < e.batch; ++b) {
        for (std::int64_t p = 0; p < e.positions; ++p) {
            double total = 0;
            for (std::int64_t c = 0; c < e.channels; ++c) {
                total += z.at(b, c, p) * z.at(b, c, p);
                CHECK(near(out.at(b, c, p), 2 * grad[b * e.positions + p] * z.at(b, c, p)));
            }
            CHECK(near(norms[b * e.positions + p], total));
        }
    }
}

void check_strides() {
    float memory[64] = {};
    const std::int64_t sizes[] = {2, 3, 2, 4}, dense[] = {24, 8, 4, 1}, last[] = {24, 1, 12, 3},
                       crossed[] = {24, 8, 1, 2}, expanded[] = {24, 8, 0, 1}, single[] = {2, 3, 1, 1};
    const auto maps = flatten(memory, sizes, dense), rows = flatten(memory, sizes, last);
    CHECK(maps && maps->position == 1 && maps->channel == 8);
    CHECK(rows && rows->position == 3 && rows->channel == 1);
    CHECK(!flatten(memory, sizes, crossed));
    CHECK(!flatten(memory, sizes, expanded));
    CHECK(flatten(memory, single, expanded).has_value());
    const std::int64_t none[] = {0, 1, 0, 2}, of_none[] = {2, 2, 2, 1};
    CHECK(flatten(memory, none, of_none)->position == 1);
    CHECK(common_layout(8, *maps) == Layout::maps);
    CHECK(common_layout(8, *rows) == Layout::rows);
    CHECK(common_layout(8, *maps, *rows) == Layout::other);
    const std::int64_t repeated[] = {0, 1, 1}, permutation[] = {2, 0, 1};
    CHECK(!inverse_of(repeated, 3));
    CHECK((*inverse_of(permutation, 3) == std::vector<std::int64_t>{1, 2, 0}));
}

}  // namespace couplings_test

int test_couplings(int, char*[]) {
    using namespace couplings_test;
    const Extent extents[] = {{2, 5, 7}, {3, 70, 300}, {1, 300, 3}, {500, 33, 1},
                              {0, 4, 3}, {2, 4, 0},    {2, 1, 5}};
    for (const Extent& e : extents) {
        for (const bool rows : {false, true}) {
            for (const std::int64_t split : {std::int64_t{0}, e.channels / 2, e.channels})
                for (const float clamp : {Coupling::none, 0.0f, 1.9f})
                    for (const bool permutes : {false, true})
                        for (const bool scales : {false, true}) {
                            for (const bool inverse : {false, true})
                                check_coupling(e, split, {clamp, inverse}, rows, permutes, scales);
                            check_undo(e, split, {clamp, false}, rows, permutes, scales);
                        }
            check_norms(e, rows);
        }
    }
    check_strides();
    return failures != 0;
}
