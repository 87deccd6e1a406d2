// Runs the stages of a fused flow. A stretch of rows passes through consecutive stages that treat every row
// alone while it is in the cache, so that the state goes through memory once. Where a conditioner looks at
// neighbours, its layers are computed one after the other on all rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>
#include <vector>

#include "line.hpp"
#include "passes.hpp"
#include "team.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Numbers of the state of the images that pass all stages together. Fewer in tests.
inline std::int64_t numbers_together = 1 << 18;

class StageRun : Passes {
public:
    explicit StageRun(int channels) : Passes(channels) {}

    // Throws std::invalid_argument for a stage that does not fit.
    void add(Stage stage) {
        check(stage, channels_);
        int conditions = 0;
        if (const Conditioner* conditioner = conditioner_of(stage)) {
            if (conditioner->passive) widest_ = std::max(widest_, conditioner->passive->size());
            for (const Layer& layer : conditioner->layers) {
                widest_ = std::max(widest_, layer.outputs());
                conditions += layer.conditioned;
            }
        }
        if (const Half* const half = seen_by(stage)) widest_seen_ = std::max(widest_seen_, half->size());
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
        const auto run_some = [&](std::int64_t first, std::int64_t last, int team) {
            const Maps some{last - first, maps.height, maps.width};
            const std::int64_t row = first * maps.positions();
            std::vector<Condition> theirs = conditions;
            for (Condition& condition : theirs) condition = condition.from(row);
            T* const out = to + row * channels_;
            const FreesMuch after{!pointwise() && some.rows() * channels_ > team * most_kept()};
            run_together(from + row * channels_, out,
                         Call{some, team, theirs.data(), memory_of_state(out, some),
                              log_det ? log_det + row : nullptr});
        };
        if (pointwise()) return run_some(0, maps.images, threads);
        // A conditioner that looks at neighbours has the whole state read again. What a thread wrote is in
        // its own cache, so that each has images of its own, if there are enough and they are not large.
        const std::int64_t numbers = maps.positions() * channels_;
        const std::int64_t alone = numbers > most_kept() ? 0 : maps.images / threads * threads;
        const std::int64_t some = std::max<std::int64_t>(numbers_together / numbers, 1);
        const std::int64_t each = stretch_length(alone, some, threads);
        team_for((alone + each - 1) / each, threads,
                 [&](std::int64_t i) { run_some(i * each, std::min((i + 1) * each, alone), 1); });
        for (std::int64_t first = alone; first < maps.images; first += some * threads)
            run_some(first, std::min(first + some * threads, maps.images), threads);
    }

private:
    struct Step {
        Stage stage;
        int first_condition;
    };
    using Iterator = std::vector<Step>::const_iterator;
    // Of the calling thread, kept from call to call: what layers see and make for all rows, and the state.
    struct Workspace {
        Floats layers[2], seen, state;
    };
    static Workspace& workspace() {
        static thread_local Workspace memory;
        return memory;
    }
    // Numbers of the state per thread whose workspace is kept. A single image may have more.
    static std::int64_t most_kept() { return 4 * numbers_together; }
    struct FreesMuch {
        bool much;
        ~FreesMuch() {
            if (much) workspace() = {};
        }
    };

    bool pointwise() const { return std::ranges::all_of(stages_, is_pointwise, &Step::stage); }

    // Where the state of all rows is; null if every stretch has its own, which stays in the cache.
    float* memory_of_state(float* to, const Maps&) const { return to; }
    float* memory_of_state(BFloat16*, const Maps& maps) const {
        const Iterator look = next_look(stages_.begin());
        const bool in_stretches =
            look == stages_.end() || (enters_late(look) && next_look(look + 1) == stages_.end());
        return in_stretches ? nullptr : workspace().state.at_least(maps.rows() * channels_);
    }
    // Whether a stage that looks at neighbours sees what comes in, so that the state can wait for its update.
    bool enters_late(Iterator look) const {
        return look == stages_.begin() && look != stages_.end() && seen_by(look->stage);
    }
    Iterator next_look(Iterator begin) const {
        return std::find_if_not(begin, stages_.end(),
                                [](const Step& step) { return is_pointwise(step.stage); });
    }

    // Stretches enter the state and pass the stages up to the first that looks at neighbours. From there on,
    // the stage that looks hands them to the stages after it while they are in the cache.
    template <class T>
    void run_together(const T* from, T* to, const Call& call) const {
        float* const seen = workspace().seen.at_least(call.maps.rows() * widest_seen_);
        Iterator look = next_look(stages_.begin());
        const bool late = enters_late(look);
        for_stretches(call, 2 * channels_ + 2 * widest_, [&](Stretch on) {
            if (late) return take_seen(look->stage, from + on.first * channels_, on, seen);
            pass_on(enter(from, on), look, seen, to, on);
        });
        while (look != stages_.end()) {
            const bool enters = enters_late(look);
            const Iterator begin = look + 1, next = next_look(begin);
            this->look(*look, call, seen, [&](Stretch on, const auto& update) {
                if (enters) enter(from, on);
                update(on);
                pass_on(begin, next, seen, to, on);
            });
            look = next;
        }
    }
    // Returns the first stage that is still to be passed.
    template <class T>
    Iterator enter(const T* from, Stretch& on) const {
        const std::int64_t numbers = std::int64_t{on.rows} * channels_;
        if (!on.call.state) on.state = on.scratch.state.at_least(numbers);
        from += on.first * channels_;
        const Iterator first = stages_.begin();
        if constexpr (!std::is_same_v<T, float>) {
            const auto* const product =
                first == stages_.end() ? nullptr : std::get_if<Product>(&first->stage);
            if (product && product->weights.pairs()) {
                Passes::enter(*product, from, on);
                return std::next(first);
            }
        }
        if (static_cast<const void*>(from) != state(on)) widen_to(from, numbers, state(on));
        return first;
    }
    // Passes the stages up to one that looks at neighbours, and leaves what it sees, or the result.
    template <class T>
    void pass_on(Iterator begin, Iterator look, float* seen, T* to, const Stretch& on) const {
        constexpr bool rounds = !std::is_same_v<T, float>;
        const bool leaves =
            rounds && look == stages_.end() && begin != look && this->leaves(std::prev(look)->stage);
        const Iterator last = leaves ? std::prev(look) : look;
        for (Iterator step = begin; step != last; ++step)
            std::visit([&](const auto& stage) { pass(stage, step->first_condition, on); }, step->stage);
        if (look != stages_.end()) return take_seen(look->stage, state(on), on, seen);
        if constexpr (rounds) {
            to += on.first * channels_;
            if (!leaves) return round_to(state(on), std::int64_t{on.rows} * channels_, to);
            std::visit(
                [&](const auto& stage) {
                    if constexpr (requires { leave(stage, on, to); }) leave(stage, on, to);
                },
                last->stage);
        }
    }
    template <class T>
    void take_seen(const Stage& stage, const T* rows, const Stretch& on, float* seen) const {
        if (const Half* const half = seen_by(stage))
            take_passive(*conditioner_of(stage), rows, on.rows, seen + on.first * half->size());
    }

    // Runs a stage whose conditioner looks at neighbours. Calls around(stretch, update) for stretches of the
    // state, in which update(stretch) changes it.
    template <class Around>
    void look(const Step& step, const Call& call, const float* seen, const Around& around) const {
#ifdef USF_AMX
        if (takes_words(step.stage)) return look_along_line(step, call, around);
#endif
        look_around(step, call, seen, around);
    }
    template <class Around>
    void look_around(const Step& step, const Call& call, const float* seen, const Around& around) const {
        const Conditioner& conditioner = *conditioner_of(step.stage);
        Inputs in{call.state, channels_};
        if (conditioner.passive) in = {seen, conditioner.passive->size()};
        int condition = step.first_condition;
        // A coupling uses the outputs of its last layer at once. A residual block must not: it would change
        // the state that its first layer still has to see. Nor may an only layer, as what it sees makes way
        // for what the next conditioner sees.
        const std::size_t all = conditioner.layers.size();
        const std::size_t whole = all - (all > 1 && !std::holds_alternative<Residual>(step.stage));
        for (std::size_t i = 0; i < whole; ++i) {
            const Layer& layer = conditioner.layers[i];
            const int width = layer.outputs();
            float* const out = workspace().layers[i % 2].at_least(call.maps.rows() * width);
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
            around(on, [&](const Stretch& entered) {
                std::visit(
                    [&](const auto& stage) {
                        if constexpr (requires { stage.conditioner; }) update(stage, outputs, entered);
                    },
                    step.stage);
            });
        };
        const std::int64_t floats = in.stride + width + 2 * channels_;
        if (last)
            for_stretches_of(*last, call, floats, update_stretch);
        else
            for_stretches(call, floats, update_stretch);
    }

#ifdef USF_AMX
    // The same if all of its layers take words.
    template <class Around>
    void look_along_line(const Step& step, const Call& call, const Around& around) const {
        Floats* const memory = workspace().layers;
        const Conditioner& conditioner = *conditioner_of(step.stage);
        const std::vector<Layer>& layers = conditioner.layers;
        const Line line(call.maps, layers);
        const std::int64_t length = call.maps.width;
        const auto of_rows = [&](std::int64_t first, std::int64_t last, const LineStretch& on) {
            return Stretch{call, first * length, static_cast<int>((last - first) * length), on.scratch};
        };
        LineOfWords in(line, conditioner.passive ? conditioner.passive->size() : channels_, memory[0]);
        for_stretches_of(line, call, channels_ + in.words, [&](const LineStretch& on) {
            on.for_rows([&](std::int64_t row, std::int64_t first, std::int64_t) {
                see(conditioner, of_rows(row, row + 1, on), in.at(on) + first * in.words);
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
            around(of_rows(on.first, on.last, on), [&](const Stretch&) {
                if (const auto* const residual = std::get_if<Residual>(&step.stage)) {
                    const AddToRows add{rows_of_pixels(call.state, channels_, on), residual->factor};
                    return multiply_in_tiles(Inputs{out, stride, true}, on.positions(), residual->weights,
                                             add);
                }
                on.for_rows([&](std::int64_t row, std::int64_t first, std::int64_t) {
                    const Inputs outputs{out + first * stride, stride};
                    std::visit(
                        [&](const auto& stage) {
                            if constexpr (requires { stage.active; })
                                update(stage, outputs, of_rows(row, row + 1, on));
                        },
                        step.stage);
                });
            });
        });
    }
#endif

    int widest_ = 1, widest_seen_ = 0;
    int conditions_ = 0;
    std::vector<Step> stages_;
};

}  // namespace usf
#endif
