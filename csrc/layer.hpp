// Layers of conditioners, applied to stretches of the rows [images * height * width, channels] of maps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <variant>
#include <vector>

#include "call.hpp"
#include "filters.hpp"
#include "product.hpp"
#include "rows.hpp"
#include "team.hpp"
#include "winograd.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// A linear layer or a convolution (stride 1, padded with zeros to the same size), followed by its activation.
class Layer {
public:
    // The matrix of a convolution is [outputs, taps * inputs]. With `pairs`, which the processor must be able
    // to multiply, products are of bfloat16 numbers. Without AMX this excludes convolutions that do not use
    // Winograd's filtering.
    Layer(const float* matrix, const float* bias, int outputs, int inputs, bool relu, bool conditioned,
          int kernel_height = 1, int kernel_width = 1, bool pairs = false)
        : relu(relu),
          conditioned(conditioned),
          kernel_height(kernel_height),
          kernel_width(kernel_width),
          weights_(of(matrix, bias, outputs, inputs, kernel_height, kernel_width, pairs)) {}

    const bool relu;
    const bool conditioned;  // a condition's share is added before the activation
    const int kernel_height, kernel_width;

    Ending ending() const { return relu ? Ending::relu : Ending::plain; }
    int taps() const { return kernel_height * kernel_width; }
    int outputs() const {
        return std::visit([](const auto& weights) { return weights.outputs(); }, weights_);
    }
    int inputs() const { return filters() ? filters()->inputs() : weights().inputs() / taps(); }
    const Weights& weights() const { return std::get<Weights>(weights_); }
    const Filters* filters() const { return std::get_if<Filters>(&weights_); }  // null for none
    bool takes_words() const { return !filters() && weights().pairs(); }

private:
    using Either = std::variant<Weights, Filters>;

    static Either of(const float* matrix, const float* bias, int outputs, int inputs, int height, int width,
                     bool pairs) {
        if (pairs && has_amx()) return Weights(matrix, bias, outputs, inputs, pairs, height * width);
        if (height == 3 && width == 3 && std::min(outputs, inputs / 9) >= fewest_channels)
            return Filters(matrix, bias, outputs, inputs / 9, pairs);
        return Weights(matrix, bias, outputs, inputs, pairs && height * width == 1);
    }
    Either weights_;
};

// Numbers that stay in the second-level cache; fewest rows or tiles worth fetching a layer's weights for, and
// of rows with AMX, which multiplies faster than weights arrive.
constexpr std::int64_t cache_numbers = 384 << 8, least_rows = 48, least_rows_of_amx = 80;

// Length of stretches of at most `most` units, such that each thread gets equally many.
inline std::int64_t stretch_length(std::int64_t units, std::int64_t most, int threads) {
    const std::int64_t count = std::max<std::int64_t>(1, (units + most - 1) / most);
    const std::int64_t each = (count + threads - 1) / threads * threads;
    return std::max<std::int64_t>(1, (units + each - 1) / each);
}

// Calls body for stretches of rows that stay in the cache, with `numbers` numbers per row. Their length is a
// multiple of the rows that keep a product's units busy; one of whole tiles would give threads unequal
// shares.
template <class Body>
void for_stretches(const Call& call, std::int64_t numbers, Body&& body) {
    constexpr std::int64_t some = 4;
    const std::int64_t rows = call.maps.rows();
    const std::int64_t most = std::max(has_amx() ? least_rows_of_amx : least_rows, cache_numbers / numbers);
    const std::int64_t length = (stretch_length(rows, most, call.threads) + some - 1) / some * some;
    team_for((rows + length - 1) / length, call.threads, [&](std::int64_t i) {
        const std::int64_t first = i * length;
        body(Stretch{call, first, static_cast<int>(std::min(length, rows - first)), scratch_of_thread()});
    });
}

// The same for stretches of whole rows of tiles.
template <int side, class Body>
void for_stretches_of(const Winograd<side>& winograd, const Call& call, std::int64_t numbers, Body&& body) {
    const TileRows<side> rows(call.maps);
    numbers = side * side * numbers + winograd.points * (winograd.inputs() + winograd.outputs());  // per tile
    const std::int64_t tiles = std::max(least_rows, cache_numbers / numbers);
    const std::int64_t length = stretch_length(rows.count, rows.holding(tiles), call.threads);
    team_for((rows.count + length - 1) / length, call.threads, [&](std::int64_t i) {
        body(rows.stretch(call, i * length, std::min((i + 1) * length, rows.count)));
        rows.free_if_much(tiles);
    });
}

// The same for stretches of the kind that the layer takes.
template <class Body>
void for_stretches_of(const Layer& layer, const Call& call, std::int64_t numbers, Body&& body) {
    if (const Filters* const filters = layer.filters())
        filters->visit(call, [&](const auto& winograd) { for_stretches_of(winograd, call, numbers, body); });
    else
        for_stretches(call, numbers, body);
}

// Lists the tiles of a stretch of whole rows of tiles. `out` holds the stretch's outputs, `beside` a row for
// each of its rows; both may be null.
template <int side>
void find_tiles(int inputs, int outputs, const Inputs& all, const Stretch& on, float* out,
                const float* const* beside) {
    constexpr int patch = TileSizes<side>::patch;
    const auto [images, height, width] = on.call.maps;
    float* const zeros = on.scratch.zeros.at_least(inputs);
    std::fill_n(zeros, inputs, 0.0f);
    std::vector<WinogradTile<side>>& tiles = on.scratch.template tiles_of<side>();
    tiles.clear();
    for (std::int64_t row = on.first; row < on.first + on.rows;) {
        const std::int64_t top = row / width % height;
        for (std::int64_t left = 0; left < width; left += side) {
            WinogradTile<side>& tile = tiles.emplace_back();
            for (int i = 0; i < patch * patch; ++i) {
                const std::int64_t dy = i / patch - 1, x = left + i % patch - 1;
                const bool inside = top + dy >= 0 && top + dy < height && x >= 0 && x < width;
                tile.from[i] = inside ? all.data + (row + dy * width + x) * all.stride : zeros;
            }
            for (int i = 0; i < side * side; ++i) {
                const std::int64_t dy = i / side, x = left + i % side;
                const bool inside = top + dy < height && x < width;
                const std::int64_t at = row - on.first + dy * width + x;
                tile.to[i] = inside && out ? out + at * outputs : nullptr;
                tile.beside[i] = inside && beside ? beside[at] : nullptr;
            }
        }
        row += std::min<std::int64_t>(side, height - top) * width;
    }
}

inline Neighbours neighbours(const Layer& layer, const Inputs& all, const Stretch& on) {
    const auto [images, height, width] = on.call.maps;
    const int channels = layer.weights().inputs() / layer.taps();
    float* const zeros = on.scratch.zeros.at_least(channels);
    std::fill_n(zeros, channels, 0.0f);
    std::vector<const float*>& pointers = on.scratch.pointers;
    pointers.resize(static_cast<std::size_t>(layer.taps()) * on.rows);
    const std::int64_t above = layer.kernel_height / 2, left = layer.kernel_width / 2;
    for (int r = 0; r < on.rows; ++r) {
        const std::int64_t row = on.first + r, y = row / width % height, x = row % width;
        const float** pointer = pointers.data() + r;
        for (std::int64_t dy = -above; dy < layer.kernel_height - above; ++dy) {
            const bool inside = y + dy >= 0 && y + dy < height;
            for (std::int64_t dx = -left; dx < layer.kernel_width - left; ++dx, pointer += on.rows)
                *pointer = inside && x + dx >= 0 && x + dx < width
                               ? all.data + (row + dy * width + dx) * all.stride
                               : zeros;
        }
    }
    return {pointers.data(), on.rows, layer.taps()};
}

// Some numbers of a condition, from index `at` on, as floats; rounded ones are widened into `to`.
inline const float* as_floats(const Condition& condition, std::int64_t at, std::int64_t numbers, float* to) {
    if (!condition.rounded) return condition.data + at;
    widen_to(condition.rounded + at, numbers, to);
    return to;
}

inline const float* const* rows_of_condition(int index, const Stretch& on) {
    const Condition& condition = on.call.conditions[index];
    const std::int64_t positions = on.call.maps.positions(), width = condition.width;
    float* widened = on.scratch.shares.at_least(condition.rounded ? on.rows * width : 0);
    on.scratch.condition.resize(on.rows);
    for (int r = 0; r < on.rows; ++r) {
        const std::int64_t row = on.first + r, at = condition.images == 1 ? row % positions : row;
        on.scratch.condition[r] = as_floats(condition, at * width, width, widened);
        if (condition.rounded) widened += width;
    }
    return on.scratch.condition.data();
}

// Computes the outputs of a stretch; `all` are the inputs of all rows.
template <int side>
void apply(const Winograd<side>& winograd, Ending ending, const Inputs& all, const Stretch& on, float* out,
           const float* const* beside) {
    find_tiles<side>(winograd.inputs(), winograd.outputs(), all, on, out, beside);
    convolve(on.scratch.template tiles_of<side>(), winograd, ending, on.scratch.points[0],
             on.scratch.points[1]);
}
inline void apply(const Layer& layer, const Inputs& all, const Stretch& on, float* out, int condition) {
    const float* const* const shares = layer.conditioned ? rows_of_condition(condition, on) : nullptr;
    if (const Filters* const filters = layer.filters())
        return filters->visit(
            on.call, [&](const auto& winograd) { apply(winograd, layer.ending(), all, on, out, shares); });
    const Store store{out, layer.outputs(), layer.weights().bias(), layer.relu ? Ending::relu : Ending::plain,
                      shares};
    if (layer.taps() > 1)
        multiply(neighbours(layer, all, on), on.rows, layer.weights(), store);
    else
        multiply(Inputs{all.data + on.first * all.stride, all.stride}, on.rows, layer.weights(), store,
                 on.scratch.rounded);
}

// Calls body(store), where store writes a layer's outputs to contiguous rows of words or of floats.
template <class Body>
void with_store(const Layer& layer, bool words, float* out, const float* const* shares, Body&& body) {
    const float* const bias = layer.weights().bias();
    const std::ptrdiff_t outputs = layer.outputs(), padded = std::ptrdiff_t{2} * words_of(layer.outputs());
    if (words)
        body(StoreAs<BFloat16>{reinterpret_cast<BFloat16*>(out), padded, bias, layer.ending(), shares});
    else
        body(Store{out, outputs, bias, layer.ending(), shares});
}

// The outputs of a pointwise layer for the rows of a stretch.
inline Inputs apply_to_rows(const Layer& layer, const Inputs& in, const Stretch& on,
                            const float* const* shares, bool words, Floats& memory) {
    const int width = words ? words_of(layer.outputs()) : layer.outputs();
    float* const out = rows_of_words(memory, on.rows, width);
    with_store(layer, words, out, shares,
               [&](const auto& store) { multiply(in, on.rows, layer.weights(), store, on.scratch.rounded); });
    return {out, width, words};
}

// Computes the outputs of all rows.
template <int side>
void apply(const Winograd<side>& winograd, Ending ending, const Inputs& in, const Call& call, float* out) {
    const std::int64_t width = winograd.outputs();
    for_stretches_of(winograd, call, in.stride + width, [&](const Stretch& on) {
        const float* const* const beside = call.conditions ? rows_of_condition(0, on) : nullptr;
        apply(winograd, ending, in, on, out + on.first * width, beside);
    });
}
inline void apply(const Layer& layer, const Inputs& in, const Call& call, float* out, int condition = 0) {
    const std::int64_t width = layer.outputs();
    for_stretches_of(layer, call, in.stride + width,
                     [&](const Stretch& on) { apply(layer, in, on, out + on.first * width, condition); });
}

// The same for rows in bfloat16 and a linear layer of pairs, whose inputs and outputs fill whole words.
inline void apply(const Layer& layer, const BFloat16* rows, const Call& call, BFloat16* out) {
    const std::int64_t inputs = layer.weights().inputs(), width = layer.outputs(), words = inputs / 2;
    for_stretches(call, (inputs + width) / 2, [&](const Stretch& on) {
        const auto* const from = reinterpret_cast<const float*>(rows + on.first * inputs);
        multiply(Inputs{from, words, true}, on.rows, layer.weights(),
                 StoreAs<BFloat16>{out + on.first * width, width, layer.weights().bias(), layer.ending(),
                                   nullptr});
    });
}

}  // namespace usf
#endif
