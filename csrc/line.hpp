// Convolutions of maps of words, tap after tap. The maps lie in one line with zeros between them, so that a
// tap is a shift of the line, and whole tiles of positions are rows with a constant stride, as AMX needs
// them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layer.hpp"

#if defined(USF_PRODUCTS) && defined(USF_AMX)

namespace usf {

// Rows of words in a line, shifted by a number of rows for each tap of a kernel.
using Shifts = std::vector<std::ptrdiff_t>;
struct Shifted {
    const float* data;
    std::ptrdiff_t stride;
    const Shifts& shifts;

    int taps() const { return static_cast<int>(shifts.size()); }
    static constexpr int step() { return 1; }
    USF_INLINE const float* row(int tap, int r) const { return data + (r + shifts[tap]) * stride; }
};

// Layout of non-empty maps in a line: zeros after each row of a map, which are also those before the
// next row, and rows of zeros after each map. Before and after all is a margin as large as the largest
// kernel sees.
struct Line {
    Maps maps;
    std::int64_t above = 0, left = 0;

    Line(const Maps& maps, const std::vector<Layer>& layers) : maps(maps) {
        for (const Layer& layer : layers) {
            above = std::max<std::int64_t>(above, layer.kernel_height / 2);
            left = std::max<std::int64_t>(left, layer.kernel_width / 2);
        }
    }
    std::int64_t pitch() const { return maps.width + left; }
    std::int64_t margin() const { return above * pitch() + left; }
    std::int64_t rows() const { return maps.images * maps.height; }
    // Start of a map's row, counted over all maps; that of the row after the last one is the length.
    std::int64_t start(std::int64_t row) const { return row / maps.height * above * pitch() + row * pitch(); }
    // Shifts of the taps of a layer's kernel, in positions.
    Shifts shifts(const Layer& layer) const {
        Shifts shifts;
        for (std::int64_t dy = 0; dy < layer.kernel_height; ++dy)
            for (std::int64_t dx = 0; dx < layer.kernel_width; ++dx)
                shifts.push_back((dy - layer.kernel_height / 2) * pitch() + dx - layer.kernel_width / 2);
        return shifts;
    }
};

// Some rows of the maps, with the zeros after each.
struct LineStretch {
    const Line& line;
    std::int64_t first, last;
    Scratch& scratch;

    std::int64_t begin() const { return line.start(first); }
    int positions() const { return static_cast<int>(line.start(last) - begin()); }
    // Calls body(row of the maps, its first position in this stretch, positions to the next one).
    template <class Body>
    void for_rows(Body&& body) const {
        for (std::int64_t row = first; row < last; ++row)
            body(row, line.start(row) - begin(), line.start(row + 1) - line.start(row));
    }
};

// Fewest positions worth fetching the weights of all taps for.
constexpr std::int64_t least_positions = 512;

// Calls body for stretches that stay in the cache, with `numbers` numbers per position.
template <class Body>
void for_stretches_of(const Line& line, const Call& call, std::int64_t numbers, Body&& body) {
    const std::int64_t rows = line.rows(), most = std::max(least_positions, cache_numbers / numbers);
    const std::int64_t length =
        stretch_length(rows, std::max<std::int64_t>(most / line.pitch(), 1), call.threads);
    team_for((rows + length - 1) / length, call.threads, [&](std::int64_t i) {
        body(LineStretch{line, i * length, std::min((i + 1) * length, rows), scratch_of_thread()});
    });
}

// Memory for the words at all positions, with margins of zeros.
struct LineOfWords {
    float* data;
    int words;

    LineOfWords(const Line& line, int numbers, Floats& memory) : words(words_of(numbers)) {
        const std::int64_t positions = line.start(line.rows());
        const std::int64_t margin = line.margin() * words, length = positions * words;
        data = rows_of_words(memory, positions + 2 * line.margin(), words) + margin;
        std::fill_n(data - margin, margin, 0.0f);
        std::fill_n(data + length, margin, 0.0f);
    }
    float* at(const LineStretch& on) const { return data + on.begin() * words; }
    // Sets the positions without a pixel to 0.
    void clear(const LineStretch& on) const {
        on.for_rows([&](std::int64_t, std::int64_t first, std::int64_t count) {
            const std::int64_t width = on.line.maps.width;
            std::fill_n(at(on) + (first + width) * words, (count - width) * words, 0.0f);
        });
    }
};

// For each position, the row [channels] of its pixel; null where there is none.
inline float* const* rows_of_pixels(float* pixels, int channels, const LineStretch& on) {
    on.scratch.rows.assign(on.positions(), nullptr);
    on.for_rows([&](std::int64_t row, std::int64_t first, std::int64_t) {
        for (std::int64_t x = 0; x < on.line.maps.width; ++x)
            on.scratch.rows[first + x] = pixels + (row * on.line.maps.width + x) * channels;
    });
    return on.scratch.rows.data();
}

// For each position, the condition's row for its pixel; any memory where there is none.
inline const float* const* rows_of_condition(const Condition& condition, const LineStretch& on) {
    const std::int64_t width = condition.width;
    const Maps& maps = on.line.maps;
    const std::int64_t pixels = (on.last - on.first) * maps.width;
    float* widened = on.scratch.shares.at_least((condition.rounded ? pixels + 1 : 1) * width);
    on.scratch.condition.assign(on.positions(), widened);
    on.for_rows([&](std::int64_t row, std::int64_t first, std::int64_t) {
        const std::int64_t at = (condition.images == 1 ? row % maps.height : row) * maps.width;
        const float* const from = as_floats(condition, at * width, maps.width * width, widened);
        for (std::int64_t x = 0; x < maps.width; ++x) on.scratch.condition[first + x] = from + x * width;
        if (condition.rounded) widened += maps.width * width;
    });
    return on.scratch.condition.data();
}

// Computes a layer's outputs of a stretch, as words or as floats.
inline void apply(const Layer& layer, const LineOfWords& in, const Shifts& shifts, const LineStretch& on,
                  bool words, float* out, const float* const* shares) {
    const Panels weights = layer.weights();
    with_store(layer, words, out, shares, [&](const auto& store) {
        multiply_in_tiles(Shifted{in.at(on), in.words, shifts}, on.positions(), weights, store);
    });
}

}  // namespace usf
#endif
