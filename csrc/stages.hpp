// The stages of a fused flow, which change its state, rows [images * height * width, channels].
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "layer.hpp"
#include "reorder.hpp"
#include "rows.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Layers and their input: the channels `passive` of the state plus a shift, or the whole state.
struct Conditioner {
    std::optional<Half> passive;
    std::vector<Layer> layers;
    std::vector<float> shift = {};  // added to the passive channels; empty for none

    bool pointwise() const {
        for (const Layer& layer : layers)
            if (layer.taps() > 1) return false;
        return true;
    }
};

// state = state @ weights.T + bias
struct Product {
    Weights weights;
};
// state[to] = state @ weights.T + bias
struct Exchange {
    Weights weights;
    Half to;
};
// state += bias
struct Shift {
    std::vector<float> bias;
};
// state += factor * f(state) @ weights.T, without a bias
struct Residual {
    Conditioner conditioner;
    Weights weights;
    float factor;
};
// state[active] += factor * f(state[passive])
struct Additive {
    Conditioner conditioner;
    Half active;
    float factor;
};
// `affine` on the active half
struct Affine {
    Conditioner conditioner;
    Half active;
    std::vector<float> shift;
    float clamp;
    bool inverse;
};
using Stage = std::variant<Product, Exchange, Shift, Reorder, Residual, Additive, Affine>;

// Copies the input of a conditioner with passive channels for some rows to [rows, passive channels].
template <class T>
void take_passive(const Conditioner& conditioner, const T* state, int rows, float* to) {
    const int size = conditioner.passive->size();
    conditioner.passive->take(state, rows, to, size);
    if (!conditioner.shift.empty()) shift_rows(to, rows, size, conditioner.shift.data());
}

// Copies the channels of a half, as words.
inline void take_words(const Half& half, const float* state, int rows, float* to) {
    const int size = half.size(), width = 2 * words_of(size);
    auto* const numbers = reinterpret_cast<BFloat16*>(to);
    half.take(state, rows, numbers, width);
    for (int r = 0; r < rows; ++r)
        std::fill(numbers + r * width + size, numbers + (r + 1) * width, BFloat16{});
}

// Throws std::invalid_argument unless a product has these sizes.
inline void check(const Weights& weights, int inputs, int outputs) {
    if (weights.inputs() != inputs || weights.outputs() != outputs)
        throw std::invalid_argument("weight: expected " + std::to_string(outputs) + " x " +
                                    std::to_string(inputs) + ", found " + std::to_string(weights.outputs()) +
                                    " x " + std::to_string(weights.inputs()));
}
// Throws std::invalid_argument unless each layer takes what the one before makes, the first one the passive
// channels of so many, and the last one makes `outputs`. Conditioners come from the user.
inline void check(const Conditioner& conditioner, int channels, int outputs) {
    const auto expect = [](const char* what, int expected, int found) {
        if (found != expected)
            throw std::invalid_argument(std::string(what) + " of subnet: expected " +
                                        std::to_string(expected) + " channels, found " +
                                        std::to_string(found));
    };
    int width = conditioner.passive ? conditioner.passive->size() : channels;
    if (!conditioner.shift.empty()) expect("shift", width, static_cast<int>(conditioner.shift.size()));
    for (const Layer& layer : conditioner.layers) {
        expect("input of a layer", layer.inputs(), width);
        width = layer.outputs();
    }
    expect("output", outputs, width);
}

// Throws std::invalid_argument for a stage that does not fit states of so many channels.
inline void check(const Stage& stage, int channels) {
    if (const auto* s = std::get_if<Product>(&stage)) check(s->weights, channels, channels);
    if (const auto* s = std::get_if<Exchange>(&stage)) check(s->weights, channels, s->to.size());
    if (const auto* s = std::get_if<Residual>(&stage)) {
        check(s->weights, s->weights.inputs(), channels);
        check(s->conditioner, channels, s->weights.inputs());
    }
    if (const auto* s = std::get_if<Additive>(&stage)) check(s->conditioner, channels, s->active.size());
    if (const auto* s = std::get_if<Affine>(&stage)) {
        check(s->conditioner, channels, 2 * s->active.size());
        if (static_cast<int>(s->shift.size()) != s->active.size())
            throw std::invalid_argument("shift: expected a value for each active channel");
    }
}

// The conditioner of a stage; null if it has none.
inline const Conditioner* conditioner_of(const Stage& stage) {
    return std::visit(
        [](const auto& s) -> const Conditioner* {
            if constexpr (requires { s.conditioner; })
                return &s.conditioner;
            else
                return nullptr;
        },
        stage);
}

inline bool takes_words(const Stage& stage) {
    const Conditioner* const conditioner = conditioner_of(stage);
    return conditioner && std::ranges::all_of(conditioner->layers, &Layer::takes_words);
}

inline bool is_pointwise(const Stage& stage) {
    const Conditioner* const conditioner = conditioner_of(stage);
    return !conditioner || conditioner->pointwise();
}

// The channels that have to be copied for all rows, because the stage's conditioner looks at neighbours; null
// for none. Words are copied by the stage itself.
inline const Half* seen_by(const Stage& stage) {
    if (is_pointwise(stage) || takes_words(stage)) return nullptr;
    const std::optional<Half>& passive = conditioner_of(stage)->passive;
    return passive ? &*passive : nullptr;
}

}  // namespace usf
#endif
