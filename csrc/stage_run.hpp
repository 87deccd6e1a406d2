// Runs the stages of a fused flow. A stretch of rows passes through consecutive stages that treat every row
// alone while it is in the cache, so that the state goes through memory once. Where a conditioner looks at
// neighbours, its layers are computed one after the other on all rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "line.hpp"
#include "passes.hpp"
#include "team.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Numbers of the state per thread, a limit on the images that pass all stages together. Fewer in tests.
inline std::int64_t numbers_together = 1 << 19;

class StageRun : Passes {
public:
    explicit StageRun(int channels) : Passes(channels) {}

    void add(Stage stage) {
        int conditions = 0;
        if (const Conditioner* conditioner = conditioner_of(stage)) {
            if (conditioner->passive) widest_ = std::max(widest_, conditioner->passive->size());
            for (const Layer& layer : conditioner->layers) {
                widest_ = std::max(widest_, layer.outputs());
                conditions += layer.conditioned;
            }
        }
        stages_.push_back({std::move(stage), conditions_});
        conditions_ += conditions;
    }
    int channels() const { return channels_; }

    // Transforms rows into states, [maps.rows(), channels] both, which may be the same memory. `conditions`
    // are those of the conditioned layers, in order. Adds the log-det of every row to log_det, which may be
    // null if no stage is affine. With rows in bfloat16, which the processor must be able to multiply, the
    // state is in floats between the stages.
    template <class T>
    void run(const T* from, T* to, const Maps& maps, const std::vector<Condition>& conditions, float* log_det,
             int threads) const {
        if (maps.rows() == 0) return;
        const std::int64_t images = images_together(maps, threads);
        const FreesMuch after{!pointwise() && maps.positions() * channels_ > threads * numbers_together};
        std::vector<Condition> theirs = conditions;
        for (std::int64_t first = 0; first < maps.images; first += images) {
            const Maps some{std::min(images, maps.images - first), maps.height, maps.width};
            const std::int64_t row = first * maps.positions();
            for (std::size_t i = 0; i < theirs.size(); ++i) theirs[i] = conditions[i].from(row);
            run_together(from + row * channels_, to + row * channels_,
                         Call{some, threads, theirs.data(), nullptr, log_det ? log_det + row : nullptr});
        }
    }

private:
    struct Step {
        Stage stage;
        int first_condition;
    };
    // Of the calling thread, kept from call to call: what layers make for all rows, and the state.
    struct Workspace {
        Floats layers[2], passive, state;
    };
    static Workspace& workspace() {
        static thread_local Workspace memory;
        return memory;
    }
    // A single image may need more than is to be kept.
    struct FreesMuch {
        bool much;
        ~FreesMuch() {
            if (much) workspace() = {};
        }
    };

    bool pointwise() const { return std::ranges::all_of(stages_, is_pointwise, &Step::stage); }

    // Limit the images where a conditioner looks at neighbours: their whole state is read several times.
    std::int64_t images_together(const Maps& maps, int threads) const {
        if (pointwise()) return maps.images;
        return std::max<std::int64_t>(threads * numbers_together / (maps.positions() * channels_), 1);
    }

    void run_together(const float* from, float* state, Call call) const {
        call.state = state;
        for (auto stage = stages_.begin(); stage != stages_.end();) {
            auto next = stage;
            while (next != stages_.end() && is_pointwise(next->stage)) ++next;
            if (next == stage) {
                if (from != state) copy(from, call);
                look(*next++, call);
            } else {
                pass_together(from, stage, next, call);
            }
            from = state;
            stage = next;
        }
        if (from != state) copy(from, call);
    }
    void run_together(const BFloat16* from, BFloat16* to, const Call& call) const {
        const auto numbers = [&](const Stretch& on) { return std::int64_t{on.rows} * channels_; };
        // Stretches have a state of their own, which stays in the cache.
        if (pointwise())
            return for_stretches(call, 2 * channels_ + 2 * widest_, [&](Stretch on) {
                on.state = on.scratch.state.at_least(numbers(on));
                widen_to(from + on.first * channels_, numbers(on), on.state);
                pass_all(stages_.begin(), stages_.end(), on);
                round_to(on.state, numbers(on), to + on.first * channels_);
            });
        float* const state = workspace().state.at_least(call.maps.rows() * channels_);
        for_stretches(call, 2 * channels_, [&](const Stretch& on) {
            widen_to(from + on.first * channels_, numbers(on), state + on.first * channels_);
        });
        run_together(state, state, call);
        for_stretches(call, 2 * channels_, [&](const Stretch& on) {
            round_to(state + on.first * channels_, numbers(on), to + on.first * channels_);
        });
    }

    void copy(const float* from, const Call& call) const {
        for_stretches(call, 2 * channels_, [&](const Stretch& on) {
            std::copy_n(from + on.first * channels_, std::int64_t{on.rows} * channels_, state(on));
        });
    }

    template <class Iterator>
    void pass_together(const float* from, Iterator begin, Iterator end, const Call& call) const {
        for_stretches(call, channels_ + 2 * widest_, [&](const Stretch& on) {
            if (from != call.state)
                std::copy_n(from + on.first * channels_, std::int64_t{on.rows} * channels_, state(on));
            pass_all(begin, end, on);
        });
    }
    template <class Iterator>
    void pass_all(Iterator begin, Iterator end, const Stretch& on) const {
        for (auto step = begin; step != end; ++step)
            std::visit([&](const auto& stage) { pass(stage, step->first_condition, on); }, step->stage);
    }

    // Runs one stage whose conditioner looks at neighbours.
    void look(const Step& step, const Call& call) const {
#ifdef USF_AMX
        if (takes_words(step.stage)) return look_along_line(step, call);
#endif
        look_around(step, call);
    }
    void look_around(const Step& step, const Call& call) const {
        Workspace& memory = workspace();
        const Conditioner& conditioner = *conditioner_of(step.stage);
        const std::int64_t rows = call.maps.rows();
        Inputs in{call.state, channels_};
        if (conditioner.passive) {
            const int size = conditioner.passive->size();
            float* const passive = memory.passive.at_least(rows * size);
            for_stretches(call, channels_ + size, [&](const Stretch& on) {
                take_passive(conditioner, state(on), on.rows, passive + on.first * size);
            });
            in = {passive, size};
        }
        int condition = step.first_condition;
        // A coupling uses the outputs of its last layer at once. A residual block must not: it would change
        // the state that its first layer still has to see.
        const std::size_t all = conditioner.layers.size();
        const std::size_t whole = all - !std::holds_alternative<Residual>(step.stage);
        for (std::size_t i = 0; i < whole; ++i) {
            const Layer& layer = conditioner.layers[i];
            const int width = layer.outputs();
            float* const out = memory.layers[i % 2].at_least(rows * width);
            apply(layer, in, call, out, condition);
            in = {out, width};
            condition += layer.conditioned;
        }
        const Layer* const last = whole < all ? &conditioner.layers.back() : nullptr;
        const std::int64_t width = last ? last->outputs() : in.stride;
        const auto update_stretch = [&](const Stretch& on) {
            Inputs outputs{in.data + on.first * in.stride, in.stride};
            if (last) {
                float* const out = on.scratch.outputs[0].at_least(width * on.rows);
                apply(*last, in, on, out, condition);
                outputs = {out, static_cast<std::ptrdiff_t>(width)};
            }
            std::visit(
                [&](const auto& stage) {
                    if constexpr (requires { stage.conditioner; }) update(stage, outputs, on);
                },
                step.stage);
        };
        const std::int64_t floats = in.stride + width + channels_;
        if (last)
            for_stretches_of(*last, call, floats, update_stretch);
        else
            for_stretches(call, floats, update_stretch);
    }

#ifdef USF_AMX
    // The same if all of its layers take words.
    void look_along_line(const Step& step, const Call& call) const {
        Floats* const memory = workspace().layers;
        const Conditioner& conditioner = *conditioner_of(step.stage);
        const std::vector<Layer>& layers = conditioner.layers;
        const Line line(call.maps, layers);
        const auto of_row = [&](std::int64_t row, const LineStretch& on) {
            const std::int64_t width = call.maps.width;
            return Stretch{call, row * width, static_cast<int>(width), on.scratch};
        };
        LineOfWords in(line, conditioner.passive ? conditioner.passive->size() : channels_, memory[0]);
        for_stretches_of(line, call, channels_ + in.words, [&](const LineStretch& on) {
            on.for_rows([&](std::int64_t row, std::int64_t first, std::int64_t) {
                see(conditioner, of_row(row, on), in.at(on) + first * in.words);
            });
            in.clear(on);
        });
        int condition = step.first_condition;
        const auto shares = [&](const Layer& layer, const LineStretch& on) {
            return layer.conditioned ? rows_of_condition(call.conditions[condition], on) : nullptr;
        };
        for (std::size_t i = 0; i + 1 < layers.size(); ++i) {
            const LineOfWords out(line, layers[i].outputs(), memory[1 - i % 2]);
            const Shifts shifts = line.shifts(layers[i]);
            for_stretches_of(line, call, in.words + out.words, [&](const LineStretch& on) {
                apply(layers[i], in, shifts, on, true, out.at(on), shares(layers[i], on));
                out.clear(on);
            });
            in = out;
            condition += layers[i].conditioned;
        }
        const Layer& last = layers.back();
        const Shifts shifts = line.shifts(last);
        const bool words = std::holds_alternative<Residual>(step.stage);
        for_stretches_of(line, call, in.words + last.outputs() + channels_, [&](const LineStretch& on) {
            const std::int64_t stride = words ? words_of(last.outputs()) : last.outputs();
            float* const out = rows_of_words(on.scratch.outputs[0], on.positions(), static_cast<int>(stride));
            apply(last, in, shifts, on, words, out, shares(last, on));
            if (const auto* const residual = std::get_if<Residual>(&step.stage)) {
                const AddToRows add{rows_of_pixels(call.state, channels_, on), residual->factor};
                return multiply_in_tiles(Inputs{out, stride, true}, on.positions(), residual->weights, add);
            }
            on.for_rows([&](std::int64_t row, std::int64_t first, std::int64_t) {
                const Inputs outputs{out + first * stride, stride};
                std::visit(
                    [&](const auto& stage) {
                        if constexpr (requires { stage.active; }) update(stage, outputs, of_row(row, on));
                    },
                    step.stage);
            });
        });
    }
#endif

    int widest_ = 1;
    int conditions_ = 0;
    std::vector<Step> stages_;
};

}  // namespace usf
#endif
