// A-contrario test on the component tree: which regions of a map of squared norms are too energetic to be
// there by chance. Significances are log10 NFA (or log10 PFA: a common number of tests cancels), so smaller
// is more significant.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "max_tree.hpp"
#include "tail.hpp"

namespace usf {

// significance[i] = size_counts[area] + area * log10 Pr(X >= level); no counts: all sizes count the same.
template <class T>
void node_significance(const ComponentTree<T>& tree, const std::int32_t* area, const Tail& tail,
                       std::span<const double> size_counts, double* significance) {
    // Below, -inf stands for subtrees that are stuck.
    const auto finite = [](double value) { return std::max(value, std::numeric_limits<double>::lowest()); };
    const auto evaluate = [&](auto log_tail) {
        for (std::int32_t i = 0; i < tree.size; ++i)
            significance[i] = finite(area[i] * log_tail(tree.level[i]));
    };
    if (tail.kind() == TailKind::exact) {
        evaluate([&](double t) { return tail.exact(t); });
    } else {
        evaluate([&](double t) { return tail.chernoff(t); });
    }
    if (size_counts.empty()) return;
    for (std::int32_t i = 0; i < tree.size; ++i)
        significance[i] = finite(significance[i] + size_counts[area[i]]);
}

constexpr std::int32_t stuck = -1;

// Prunes and merges to the fixed point in one pass from the leaves to the root. Every subtree ends either as
// one most significant region, with its node in winner[i], or stuck: some bifurcation in it did not merge.
//   - one child: the smaller region stays unless the larger one is strictly more significant;
//   - several: the node replaces them if all are single regions, none of them more significant than it.
// `best` is scratch, [size]. It holds the smallest significance among the children, -inf if one is stuck.
inline void prune_and_merge(const std::int32_t* parent, std::int32_t size, const double* significance,
                            std::int32_t* winner, double* best) {
    // Until a node is reached, its winner holds one of these, or the winner of its only child so far.
    constexpr std::int32_t leaf = -2, bifurcation = -3;
    constexpr double infinity = std::numeric_limits<double>::infinity();
    std::fill(winner, winner + size, leaf);
    std::fill(best, best + size, infinity);
    for (std::int32_t i = size - 1; i >= 0; --i) {
        if (winner[i] == bifurcation) {
            winner[i] = significance[i] <= best[i] ? i : stuck;
        } else if (significance[i] < best[i]) {
            winner[i] = i;
        }
        if (i == 0) return;
        const std::int32_t p = parent[i], w = winner[i];
        winner[p] = winner[p] == leaf ? w : bifurcation;
        best[p] = std::min(best[p], w == stuck ? -infinity : significance[w]);
    }
}

// Finds the final region that holds each node i, region[i], or -1. `winner` becomes that of the outermost
// subtree that is not stuck.
inline void final_regions(const std::int32_t* parent, std::int32_t size, std::int32_t* winner,
                          std::int32_t* region) {
    region[0] = winner[0] == 0 ? 0 : -1;
    for (std::int32_t i = 1; i < size; ++i) {
        const std::int32_t p = parent[i];
        if (winner[p] != stuck) winner[i] = winner[p];
        region[i] = winner[i] == i ? i : region[p];
    }
}

struct Region {
    std::int32_t top, left, bottom, right;  // half-open box
    std::int32_t area;
    double level, log_nfa, row, column;  // the centroid is (row, column)
};

// The whole test, for one map after another; the workspace only grows.
template <class T>
class RegionTest {
public:
    // `energy` is (height, width), finite and not negative; size_counts is empty or [height * width + 1].
    void run(const T* energy, std::int64_t height, std::int64_t width, const Tail& tail,
             std::span<const double> size_counts, int threads = 1) {
        builder_.build(energy, height, width, Connectivity::four, threads, tree_);
        const std::int32_t n = tree_.size;
        node_areas(tree_, area_.reserve(n));
        node_significance(tree_, area_.data(), tail, size_counts, significance_.reserve(n));
        prune_and_merge(tree_.parent.data(), n, significance_.data(), winner_.reserve(n), best_.reserve(n));
        final_regions(tree_.parent.data(), n, winner_.data(), region_.reserve(n));
    }

    // Pixels of a final region get offset + its significance, at most `ceiling`; others get `ceiling`. All
    // values are finite, since interpolation multiplies them by 0.
    void write_map(double offset, double ceiling, float* map) {
        constexpr double lowest = std::numeric_limits<float>::lowest();
        float* value = value_.reserve(tree_.size);
        for (std::int32_t i = 0; i < tree_.size; ++i) {
            const std::int32_t r = region_[i];
            const double found = r < 0 ? ceiling : std::min(ceiling, offset + significance_[r]);
            value[i] = static_cast<float>(std::max(found, lowest));
        }
        const std::int32_t* node = tree_.node.data();
        for (std::int64_t p = 0; p < tree_.height * tree_.width; ++p) map[p] = value[node[p]];
    }

    // The final regions with offset + significance <= log_epsilon, in the order of their nodes.
    std::vector<Region> regions(double offset, double log_epsilon) {
        std::vector<Region> found;
        std::int32_t* index = winner_.data();  // no longer needed, reused: region node -> place in `found`
        for (std::int32_t i = 0; i < tree_.size; ++i) {
            if (region_[i] != i) continue;
            const double log_nfa = offset + significance_[i];
            index[i] = log_nfa <= log_epsilon ? static_cast<std::int32_t>(found.size()) : -1;
            if (index[i] < 0) continue;
            constexpr std::int32_t most = std::numeric_limits<std::int32_t>::max();
            found.push_back({most, most, 0, 0, area_[i], static_cast<double>(tree_.level[i]), log_nfa, 0, 0});
        }
        if (found.empty()) return found;
        for (std::int32_t y = 0, p = 0; y < tree_.height; ++y) {
            for (std::int32_t x = 0; x < tree_.width; ++x, ++p) {
                const std::int32_t r = region_[tree_.node[p]];
                if (r < 0 || index[r] < 0) continue;
                Region& f = found[index[r]];
                f.top = std::min(f.top, y), f.bottom = std::max(f.bottom, y + 1);
                f.left = std::min(f.left, x), f.right = std::max(f.right, x + 1);
                f.row += y, f.column += x;
            }
        }
        for (Region& f : found) f.row /= f.area, f.column /= f.area;
        return found;
    }

private:
    MaxTreeBuilder<T> builder_;
    ComponentTree<T> tree_;
    Buffer<std::int32_t> area_, winner_, region_;
    Buffer<double> significance_, best_;
    Buffer<float> value_;
};

}  // namespace usf
