// Stages of a flow that treat every row alone, one after the other: a stretch of rows passes all of them
// while it is in the cache, so that the state goes through memory once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "product.hpp"
#include "rows.hpp"
#include "team.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// A linear layer, its activation behind it.
struct PointwiseLayer {
    Weights weights;
    bool relu;
    bool conditioned;  // a condition's share is added in front of the activation
};

// Layers, and what they see of the state: the channels of `passive`, or all of them.
struct PointwiseConditioner {
    std::optional<Half> passive;
    std::vector<PointwiseLayer> layers;
};

// state = state @ weights.T + bias
struct PointwiseProduct {
    Weights weights;
};
// state += factor * f(state) @ weights.T, without their bias
struct PointwiseResidual {
    PointwiseConditioner conditioner;
    Weights weights;
    float factor;
};
// state[active] += factor * f(state[passive])
struct PointwiseAdditive {
    PointwiseConditioner conditioner;
    Half active;
    float factor;
};
// `affine` of the active half
struct PointwiseAffine {
    PointwiseConditioner conditioner;
    Half active;
    std::vector<float> shift;
    float clamp;
    bool inverse;
};
// state[j] = scale[j] * state[index[j]] + bias[j]
struct PointwiseReorder {
    std::vector<std::int32_t> index;
    std::vector<float> scale, bias;
};
using PointwiseStage =
    std::variant<PointwiseProduct, PointwiseResidual, PointwiseAdditive, PointwiseAffine, PointwiseReorder>;

// What a conditioned layer adds: rows [images, positions, width], one image's for all if `images` is 1.
struct Condition {
    const float* data;
    std::int64_t images;
    int width;
};

class PointwiseRun {
public:
    explicit PointwiseRun(int channels) : channels_(channels) {}

    void add(PointwiseStage stage) {
        std::visit([this](const auto& s) { measure(s); }, stage);
        stages_.push_back(std::move(stage));
    }
    int channels() const { return channels_; }

    // From rows to state, [rows, channels] both, which may be the same. `conditions` are those of the
    // conditioned layers, in order, and `positions` how many rows an image has. Adds the log-det of every row
    // to log_det [rows], which may be null where no stage is affine.
    void run(const float* from, float* state, std::int64_t rows, std::int64_t positions,
             const std::vector<Condition>& conditions, float* log_det, int threads) const {
        const std::int64_t length = stretch(rows, threads);
        team_for((rows + length - 1) / length, threads, [&](std::int64_t i) {
            thread_local Scratch scratch;
            const std::int64_t begin = i * length, count = std::min(length, rows - begin);
            Stretch on{state + begin * channels_,
                       log_det ? log_det + begin : nullptr,
                       begin,
                       positions,
                       static_cast<int>(count),
                       conditions.data()};
            if (from != state) std::copy_n(from + begin * channels_, count * channels_, on.state);
            for (const PointwiseStage& stage : stages_)
                std::visit([&](const auto& s) { pass(s, on, scratch); }, stage);
        });
    }

private:
    // Of a thread, kept from call to call: fresh memory costs more than what is done with it.
    struct Scratch {
        Floats outputs[2];
        std::vector<float> affine, log_det;
        std::vector<const float*> condition;
    };
    struct Stretch {
        float* state;
        float* log_det;
        std::int64_t first, positions;
        int rows;
        const Condition* next;  // of the conditions, the first that no layer has taken
    };

    // As many rows as stay in the second cache with what the widest conditioner makes of them, equally many
    // for each thread, and whole tiles.
    std::int64_t stretch(std::int64_t rows, int threads) const {
        constexpr std::int64_t floats = 384 << 8, least = 48, tile = 12;
        const std::int64_t most = std::max(least, floats / (channels_ + 2 * widest_));
        std::int64_t stretches = (rows + most - 1) / most;
        stretches = (stretches + threads - 1) / threads * threads;
        const std::int64_t length = (rows + stretches - 1) / std::max<std::int64_t>(stretches, 1);
        return std::max(tile, (length + tile - 1) / tile * tile);
    }

    void measure(const PointwiseReorder&) {}
    void measure(const PointwiseProduct& stage) { widest_ = std::max(widest_, stage.weights.padded()); }
    template <class Stage>
    void measure(const Stage& stage) {
        if (stage.conditioner.passive) widest_ = std::max(widest_, stage.conditioner.passive->size());
        for (const PointwiseLayer& layer : stage.conditioner.layers)
            widest_ = std::max(widest_, layer.weights.padded());
    }

    // The conditioner's outputs, rows in `scratch`.
    Inputs condition(const PointwiseConditioner& conditioner, Stretch& on, Scratch& scratch) const {
        Inputs in{on.state, channels_};
        int next = 0;
        if (conditioner.passive) {
            const int size = conditioner.passive->size();
            float* const passive = scratch.outputs[next].at_least(static_cast<std::size_t>(size) * on.rows);
            conditioner.passive->take(on.state, on.rows, passive, size);
            in = {passive, size};
            next = 1 - next;
        }
        for (const PointwiseLayer& layer : conditioner.layers) {
            const std::ptrdiff_t width = layer.weights.padded();
            float* const out = scratch.outputs[next].at_least(width * on.rows);
            multiply(in, on.rows, layer.weights,
                     Store{out, width, layer.weights.bias(), layer.relu,
                           layer.conditioned ? rows_of_condition(on, scratch) : nullptr});
            in = {out, width};
            next = 1 - next;
        }
        return in;
    }

    static const float* const* rows_of_condition(Stretch& on, Scratch& scratch) {
        const Condition& condition = *on.next++;
        scratch.condition.resize(on.rows);
        for (int r = 0; r < on.rows; ++r) {
            const std::int64_t row = on.first + r;
            scratch.condition[r] =
                condition.data + (condition.images == 1 ? row % on.positions : row) * condition.width;
        }
        return scratch.condition.data();
    }

    void pass(const PointwiseProduct& stage, Stretch& on, Scratch& scratch) const {
        const std::ptrdiff_t width = stage.weights.padded();
        float* const out = scratch.outputs[0].at_least(width * on.rows);
        multiply({on.state, channels_}, on.rows, stage.weights,
                 Store{out, width, stage.weights.bias(), false, nullptr});
        for (std::ptrdiff_t r = 0; r < on.rows; ++r)
            std::copy_n(out + r * width, channels_, on.state + r * channels_);
    }
    void pass(const PointwiseResidual& stage, Stretch& on, Scratch& scratch) const {
        const Inputs hidden = condition(stage.conditioner, on, scratch);
        multiply(hidden, on.rows, stage.weights, Add{on.state, channels_, stage.factor});
    }
    void pass(const PointwiseAdditive& stage, Stretch& on, Scratch& scratch) const {
        const Inputs shift = condition(stage.conditioner, on, scratch);
        stage.active.add(shift.data, shift.stride, stage.factor, on.rows, on.state);
    }
    void pass(const PointwiseAffine& stage, Stretch& on, Scratch& scratch) const {
        const Inputs outputs = condition(stage.conditioner, on, scratch);
        scratch.log_det.resize(on.rows);
        affine_stretch(on.state, on.rows, stage.active, outputs.data, outputs.stride, stage.shift.data(),
                       stage.clamp, stage.inverse, scratch.log_det.data(), scratch.affine);
        for (int r = 0; r < on.rows; ++r) on.log_det[r] += scratch.log_det[r];
    }

    void pass(const PointwiseReorder& stage, Stretch& on, Scratch& scratch) const {
        float* const row = scratch.outputs[0].at_least(channels_);
        for (int r = 0; r < on.rows; ++r) {
            float* const state = on.state + static_cast<std::ptrdiff_t>(r) * channels_;
            std::copy_n(state, channels_, row);
            for (int j = 0; j < channels_; ++j)
                state[j] = stage.scale[j] * row[stage.index[j]] + stage.bias[j];
        }
    }

    int channels_;
    int widest_ = 1;
    std::vector<PointwiseStage> stages_;
};

}  // namespace usf
#endif
