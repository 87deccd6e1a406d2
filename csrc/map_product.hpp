// Matrices applied to the channels of maps, whose positions lie side by side, and sums over positions of
// outer products. Maps are copied to panels one block at a time, in the cache, and transposed matrices to
// columns; nothing else is copied.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>

#include "layer.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// A view of (images, channels, positions). `image` is the stride of images. `next` is the stride of channels,
// with positions side by side, or for `rows` the stride of positions, with channels side by side.
struct MapView {
    const float* data;
    std::int64_t image, next;
    bool rows = false;

    const float* at(std::int64_t i, std::int64_t position) const {
        return data + i * image + position * (rows ? next : 1);
    }
};

// The part of a matrix that is not zero, or that is to be computed.
enum class Triangle { whole, lower, upper };

// The range of columns, out of `columns`, in which a triangle is not zero in the `count` rows from `row` on.
struct Reach {
    int first, last;

    Reach(Triangle part, int row, int count, int columns)
        : first(part == Triangle::upper ? std::min(row, columns) : 0),
          last(part == Triangle::lower ? std::min(row + count, columns) : columns) {}
};

// Blocks of at most `most` neighbouring positions, of whole panels, such that each thread gets equally many.
struct PositionBlocks {
    std::int64_t positions, length, each, count;  // per image, per block; blocks per image, and in all

    PositionBlocks(std::int64_t images, std::int64_t positions, std::int64_t most, int threads)
        : positions(positions) {
        const std::int64_t width = Panels::best_width(), panels = (positions + width - 1) / width;
        const std::int64_t shared = threads / std::gcd(std::max<std::int64_t>(images, 1), threads);
        length = stretch_length(panels, std::max<std::int64_t>(most / width, 1), shared) * width;
        each = (positions + length - 1) / length, count = images * each;
    }
    // Calls body(image, first position, positions).
    template <class Body>
    void at(std::int64_t i, Body&& body) const {
        const std::int64_t first = i % each * length;
        body(i / each, first, static_cast<int>(std::min(length, positions - first)));
    }
};

// Rows of a matrix that are multiplied together while they are in the first-level cache: whole tiles.
constexpr int rows_together = 48;

// Copies a matrix whose outputs lie side by side to columns, which are multiplied with panels.
inline Columns columns_of(const MatrixView& matrix, int outputs, int inputs, int threads, Floats& memory) {
    const int width = rows_of_tile(best_lanes());
    float* const to = memory.at_least(std::int64_t{Panels::padded(outputs, width)} * inputs);
    fill_panels(matrix, outputs, inputs, width, to, threads);
    return {to, width, inputs};
}

// Computes out[b, o, p], contiguous, from maps x. Panels of positions are made a block at a time, and
// multiply(first output, outputs, first input, panels of some inputs, store) is called for some outputs at a
// time. If the matrix is only a `part`, with zeros elsewhere, inputs that are multiplied by zeros are left
// out.
template <class Multiply>
void multiply_maps(Triangle part, int outputs, int inputs, const MapView& x, std::int64_t images,
                   std::int64_t positions, const float* bias, Ending ending, const float* mask, float* out,
                   int threads, const Multiply& multiply) {
    const int width = Panels::best_width();
    const PositionBlocks blocks(images, positions, cache_numbers / std::max(inputs, 1), threads);
    team_for(blocks.count, threads, [&](std::int64_t i) {
        blocks.at(i, [&](std::int64_t image, std::int64_t first, int count) {
            const std::int64_t columns = Panels::padded(count, width);
            float* const panels = scratch_of_thread().points[0].at_least(columns * inputs);
            fill_panels({x.at(image, first), x.next, true}, count, inputs, width, panels);
            const Panels whole{panels, nullptr, count, inputs, width};
            for (int o = 0; o < outputs; o += rows_together) {
                const std::int64_t at = (image * outputs + o) * positions + first;
                const StoreMaps store{out + at, positions, bias ? bias + o : nullptr, ending,
                                      mask ? mask + at : nullptr};
                const int rows = std::min(rows_together, outputs - o);
                const Reach reach(part, o, rows, inputs);
                multiply(o, rows, reach.first, whole.of_inputs(reach.first, reach.last), store);
            }
        });
    });
}

// out[b, o, p] = ending(sum over c of matrix[o, c] x[b, c, p] + bias[o]), contiguous, for maps x; the matrix
// is zero outside `part`.
inline void map_product(const MatrixView& matrix, Triangle part, int outputs, int inputs, const MapView& x,
                        std::int64_t images, std::int64_t positions, const float* bias, Ending ending,
                        const float* mask, float* out, int threads) {
    static thread_local Floats memory;
    const Columns turned =
        matrix.transposed ? columns_of(matrix, outputs, inputs, threads, memory) : Columns{};
    multiply_maps(part, outputs, inputs, x, images, positions, bias, ending, mask, out, threads,
                  [&](int o, int rows, int input, const Panels& weights, const StoreMaps& store) {
                      if (matrix.transposed)
                          multiply(turned.from(o, input), rows, weights, store);
                      else
                          multiply(Inputs{matrix.at(o, input), matrix.stride}, rows, weights, store);
                  });
}

// Rows up to this many numbers apart are read across in place; rows further apart would compete for few sets
// of the first-level cache.
constexpr std::int64_t nearest_rows = 192;

// Sum over positions of the outer products of a[b, :, p] and x[b, :, p], or a triangle of it.
struct OuterProduct {
    MapView a, x;
    Triangle part;
    int outputs, inputs;

    // Computes rows first..last-1 of the sum over some positions. `out` starts with row `first`; it is
    // written if `fresh`, else added to.
    void sum(std::int64_t image, std::int64_t position, int count, int first, int last, float* out,
             bool fresh) const {
        const float *const from = a.at(image, position), *const to_panels = x.at(image, position);
        // The channels of rows, side by side, become all panels at once, in the second-level cache; maps
        // become one panel after the other, in the first-level cache.
        const int width = Panels::best_width(), made = x.rows ? inputs : std::min(width, inputs);
        float* const panels =
            scratch_of_thread().points[0].at_least(std::int64_t{Panels::padded(made, width)} * count);
        if (x.rows) fill_panels({to_panels, x.next, true}, inputs, count, width, panels);
        // Rows of a, from source(row) on, are multiplied with panel after panel. For a triangle, each panel
        // has its own range of rows.
        const int step = part == Triangle::whole ? made : width;
        const auto add_rows = [&](const auto& source) {
            for (int column = 0; column < inputs; column += step) {
                const int some = std::min(step, inputs - column);
                const auto [o, end] = rows_with(column, some, first, last);
                if (o >= end) continue;
                if (!x.rows)
                    fill_panels({to_panels + column * x.next, x.next, false}, some, count, width, panels);
                const Panels weights{panels + std::int64_t{x.rows ? column : 0} * count, nullptr, some, count,
                                     width};
                float* const to = out + std::int64_t{o - first} * inputs + column;
                if (fresh)
                    multiply(source(o), end - o, weights,
                             StoreMaps{to, inputs, nullptr, Ending::plain, nullptr});
                else
                    multiply(source(o), end - o, weights, Add{to, inputs, 1.0f});
            }
        };
        if (!a.rows) return add_rows([&](int o) { return Inputs{from + o * a.next, a.next}; });
        if (a.next >= outputs && a.next <= nearest_rows)  // rows must not overlap
            return add_rows([&](int o) { return Columns{from + o, static_cast<int>(a.next)}; });
        const Columns turned =
            columns_of({from + first, a.next, true}, last - first, count, 1, scratch_of_thread().points[1]);
        add_rows([&](int o) { return turned.from(o - first, 0); });
    }
    // Rows begin..end-1, without whole tiles of rows in which the triangle has nothing in these columns.
    std::pair<int, int> rows_with(int column, int columns, int begin, int end) const {
        const int tile = rows_of_tile(best_lanes());
        if (part == Triangle::lower) begin += std::max(column - begin, 0) / tile * tile;
        if (part == Triangle::upper) end = std::min(end, column + columns);
        return {begin, end};
    }
    // First row of a group, such that all groups have equally much to compute.
    int first_row(int group, int groups) const {
        const double share = double(group) / groups;
        const double of_rows = part == Triangle::whole   ? share
                               : part == Triangle::lower ? std::sqrt(share)
                                                         : 1 - std::sqrt(1 - share);
        return static_cast<int>(std::lround(of_rows * outputs));
    }
};

// Fewest rows per thread of a sum of outer products for which each makes panels of all positions.
constexpr int fewest_rows = 96;

// out[o, c] = sum over images and positions of a[b, o, p] x[b, c, p]. For a triangle, the rest of `out` is
// unspecified. The result has the same bits for the same number of threads.
inline void outer_product(const OuterProduct& product, std::int64_t images, std::int64_t positions,
                          float* out, int threads) {
    const int outputs = product.outputs, inputs = product.inputs;
    if (images * positions == 0) {
        std::fill_n(out, std::int64_t{outputs} * inputs, 0.0f);
        return;
    }
    const auto sums_of = [&](const PositionBlocks& blocks, std::int64_t first, std::int64_t last,
                             int first_row, int last_row, float* to) {
        for (std::int64_t i = first; i < last; ++i)
            blocks.at(i, [&](std::int64_t image, std::int64_t position, int count) {
                product.sum(image, position, count, first_row, last_row, to, i == first);
            });
    };
    if (outputs >= fewest_rows * threads) {
        const PositionBlocks blocks(images, positions, long_chain, 1);
        team_for(threads, threads, [&](std::int64_t group) {
            const int first = product.first_row(static_cast<int>(group), threads),
                      last = product.first_row(static_cast<int>(group) + 1, threads);
            sums_of(blocks, 0, blocks.count, first, last, out + std::int64_t{first} * inputs);
        });
        return;
    }
    // Each group sums over a part of the positions; the sums are added up afterwards.
    static thread_local Floats memory;
    const std::int64_t size = std::int64_t{outputs} * inputs;
    const PositionBlocks blocks(images, positions, long_chain, threads);
    constexpr std::int64_t most_kept = 1 << 24;  // numbers, of each calling thread
    const std::int64_t most_groups = 1 + most_kept / std::max<std::int64_t>(size, 1);
    const int groups = workers_for(std::min(blocks.count, most_groups), threads);
    float* const sums = groups > 1 ? memory.at_least((groups - 1) * size) : nullptr;
    team_for(groups, threads, [&](std::int64_t group) {
        sums_of(blocks, blocks.count * group / groups, blocks.count * (group + 1) / groups, 0, outputs,
                group == 0 ? out : sums + (group - 1) * size);
    });
    for (int group = 1; group < groups; ++group)
        for (std::int64_t i = 0; i < size; ++i) out[i] += sums[(group - 1) * size + i];
}

}  // namespace usf
#endif
