// The stages of a fused flow, applied to a stretch of rows while it is in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "stages.hpp"

#ifdef USF_PRODUCTS

namespace usf {

class Passes {
public:
    explicit Passes(int channels) : channels_(channels) {}

    float* state(const Stretch& on) const {
        return on.state ? on.state : on.call.state + on.first * channels_;
    }

    // Writes the input of a conditioner for a stretch, as words.
    void see(const Conditioner& conditioner, const Stretch& on, float* to) const {
        if (!conditioner.passive) return round_rows(state(on), channels_, on.rows, channels_, to);
        if (conditioner.shift.empty()) return take_words(*conditioner.passive, state(on), on.rows, to);
        const int size = conditioner.passive->size();
        float* const floats = on.scratch.rounded.at_least(static_cast<std::size_t>(size) * on.rows);
        take_passive(conditioner, state(on), on.rows, floats);
        round_rows(floats, size, on.rows, size, to);
    }

    // Outputs of a pointwise conditioner for a stretch, as words if `pairs`.
    Inputs outputs(const Conditioner& conditioner, int condition, const Stretch& on, bool pairs) const {
        int next = 0;
        Inputs in = seen(conditioner, on, on.scratch.outputs[next]);
        for (auto layer = conditioner.layers.begin(); layer != conditioner.layers.end();) {
            const Layer& now = *layer++;
            next = 1 - next;
            in = apply_to_rows(now, in, on, now.conditioned ? rows_of_condition(condition++, on) : nullptr,
                               layer == conditioner.layers.end() ? pairs : layer->weights().pairs(),
                               on.scratch.outputs[next]);
        }
        return in;
    }
    // Input of a pointwise conditioner.
    Inputs seen(const Conditioner& conditioner, const Stretch& on, Floats& memory) const {
        if (!conditioner.passive) return {state(on), channels_};
        const bool words = conditioner.layers.front().takes_words();
        const int size = conditioner.passive->size(), width = words ? words_of(size) : size;
        float* const to = rows_of_words(memory, on.rows, width);
        if (words)
            see(conditioner, on, to);
        else
            take_passive(conditioner, state(on), on.rows, to);
        return {to, width, words};
    }

    void pass(const Product& stage, int, const Stretch& on) const {
        const std::int64_t numbers = std::int64_t{on.rows} * channels_;
        const bool in_place = stage.weights.pairs();  // a rounded copy is read
        float* const out = in_place ? state(on) : on.scratch.outputs[0].at_least(numbers);
        multiply(Inputs{state(on), channels_}, on.rows, stage.weights,
                 Store{out, channels_, stage.weights.bias(), Ending::plain, nullptr}, on.scratch.rounded);
        if (!in_place) std::copy_n(out, numbers, state(on));
    }
    void pass(const Exchange& stage, int, const Stretch& on) const {
        const int width = stage.to.size();
        float* const out = on.scratch.outputs[0].at_least(std::int64_t{on.rows} * width);
        multiply(Inputs{state(on), channels_}, on.rows, stage.weights,
                 Store{out, width, stage.weights.bias(), Ending::plain, nullptr}, on.scratch.rounded);
        stage.to.put(out, width, on.rows, state(on));
    }
    void pass(const Shift& stage, int, const Stretch& on) const {
        shift_rows(state(on), on.rows, channels_, stage.bias.data());
    }
    void pass(const Reorder& stage, int, const Stretch& on) const {
        stage.apply(state(on), on.rows, on.scratch.outputs[0]);
    }
    template <class Coupling>
    void pass(const Coupling& stage, int condition, const Stretch& on) const {
        update(stage, outputs(stage.conditioner, condition, on, false), on);
    }
    void pass(const Residual& stage, int condition, const Stretch& on) const {
        update(stage, outputs(stage.conditioner, condition, on, stage.weights.pairs()), on);
    }

    // A product of rounded rows that come in, of which no copy in floats is needed.
    void enter(const Product& stage, const BFloat16* from, const Stretch& on) const {
        const float* const words = as_words(from, on.rows, channels_, on.scratch.rounded);
        multiply(Inputs{words, words_of(channels_), true}, on.rows, stage.weights,
                 Store{state(on), channels_, stage.weights.bias(), Ending::plain, nullptr});
    }
    // Whether a stage can round its results itself as they leave the state.
    bool leaves(const Stage& stage) const {
        const bool whole_words = channels_ == 2 * words_of(channels_);
        return std::holds_alternative<Reorder>(stage) ||
               (whole_words && std::holds_alternative<Product>(stage));
    }
    void leave(const Product& stage, const Stretch& on, BFloat16* to) const {
        const StoreAs<BFloat16> store{to, channels_, stage.weights.bias(), Ending::plain, nullptr};
        multiply(Inputs{state(on), channels_}, on.rows, stage.weights, store, on.scratch.rounded);
    }
    void leave(const Reorder& stage, const Stretch& on, BFloat16* to) const {
        stage.apply(state(on), on.rows, on.scratch.outputs[0], to);
    }

    void update(const Residual& stage, const Inputs& hidden, const Stretch& on) const {
        multiply(hidden, on.rows, stage.weights, Add{state(on), channels_, stage.factor}, on.scratch.rounded);
    }
    void update(const Additive& stage, const Inputs& shift, const Stretch& on) const {
        stage.active.add(shift.data, shift.stride, stage.factor, on.rows, state(on));
    }
    void update(const Affine& stage, const Inputs& outputs, const Stretch& on) const {
        std::vector<float>& log_det = on.scratch.log_det;
        log_det.resize(on.rows);
        affine_stretch(state(on), on.rows, stage.active, outputs.data, outputs.stride, stage.shift.data(),
                       stage.clamp, stage.inverse, log_det.data(), on.scratch.values);
        for (int r = 0; r < on.rows; ++r) on.call.log_det[on.first + r] += log_det[r];
    }

protected:
    int channels_;
};

}  // namespace usf
#endif
