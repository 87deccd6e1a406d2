#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numbers>
#include <random>
#include <vector>

#include "check.hpp"
#include "nfa.hpp"

namespace nfa_test {

template <class A, class B>
void same(const A& found, const B& expected, const char* what) {
    if (std::equal(found.begin(), found.end(), expected.begin(), expected.end())) return;
    std::printf("%s: found", what);
    for (const auto& value : found) std::printf(" %g", static_cast<double>(value));
    std::printf("\n");
    ++failures;
}

using Ints = std::vector<std::int32_t>;
using Doubles = std::vector<double>;

// A tree of fifteen nodes, drawn by hand; significance in brackets.
//
//   0 (-33) -+- 1 (-6) --- 2 (-12) --- 3 (-15) --- 4 (-9)          a chain: 3 is kept
//            +- 5 (-12) -+- 6 (-6)                                 merges
//            |           +- 7 (-7)
//            +- 8 (-40) --- 9 (-6) -+- 10 (-20)                    does not, and what is around it is stuck
//                                   +- 11 (-3) --- 12 (-10)
//            +- 13 (-5) --- 14 (-5)                                a tie: the smaller is kept
const Ints parent = {0, 0, 1, 2, 3, 0, 5, 5, 0, 8, 9, 9, 11, 0, 13};
const Doubles significance = {-33, -6, -12, -15, -9, -12, -6, -7, -40, -6, -20, -3, -10, -5, -5};

void prune_and_merge_by_hand() {
    const auto size = static_cast<std::int32_t>(parent.size());
    Ints winner(size), region(size);
    Doubles best(size);
    usf::prune_and_merge(parent.data(), size, significance.data(), winner.data(), best.data());
    same(winner, Ints{-1, 3, 3, 3, 4, 5, 6, 7, -1, -1, 10, 12, 12, 14, 14}, "winner");
    usf::final_regions(parent.data(), size, winner.data(), region.data());
    same(region, Ints{-1, -1, -1, 3, 3, 5, 5, 5, -1, -1, 10, -1, 12, -1, 14}, "region");
}

void small_trees() {
    const auto run = [](const Ints& parents, const Doubles& values) {
        const auto size = static_cast<std::int32_t>(parents.size());
        Ints winner(size), region(size);
        Doubles best(size);
        usf::prune_and_merge(parents.data(), size, values.data(), winner.data(), best.data());
        usf::final_regions(parents.data(), size, winner.data(), region.data());
        return region;
    };
    same(run({0}, {0}), Ints{0}, "one node is its own region");
    same(run({0, 0}, {-1, -1}), Ints{-1, 1}, "a chain keeps the smaller of equals");
    same(run({0, 0}, {-2, -1}), Ints{0, 0}, "and the larger if it is more significant");
    same(run({0, 0, 0}, {-1, -1, -1}), Ints{0, 0, 0}, "a bifurcation merges equals");
    same(run({0, 0, 0}, {-1, -1, -2}), Ints{-1, 1, 2}, "but not past its most significant child");
    same(run({0, 0, 0, 0}, {-3, -1, -2, -3}), Ints{0, 0, 0, 0}, "of three");
    same(run({0, 0, 1, 1}, {-9, -1, -2, -1}), Ints{-1, -1, 2, 3}, "a chain above a stuck bifurcation");
    same(run({0, 0, 1, 2, 2}, {0, -4, -1, -1, -1}), Ints{-1, 1, 1, 1, 1}, "merged first, then pruned");
}

// The same example as in tests/test_segmentation.py: for two degrees of freedom log10 Pr(X >= t) is exactly
// -t / (2 ln 10), so that significances are pixels times level.
void whole_map() {
    const std::vector<float> u = {1, 1, 1, 1, 1, 1, 1, 1, 1,  1, 1,   //
                                  2, 5, 9, 1, 6, 4, 7, 1, 20, 2, 10,  //
                                  2, 5, 2, 1, 1, 1, 1, 1, 1,  1, 1};
    const std::vector<float> expected = {0, 0,  0,  0, 0,  0,  0,  0, 0,  0, 0,   //
                                         0, 15, 15, 0, 12, 12, 12, 0, 20, 0, 10,  //
                                         0, 15, 0,  0, 0,  0,  0,  0, 0,  0, 0};
    const usf::Tail tail(2, 1, usf::TailKind::exact);
    usf::RegionTest<float> test;
    test.run(u.data(), 3, 11, tail, {});
    std::vector<float> map(u.size());
    test.write_map(5, 5, map.data());
    for (std::size_t p = 0; p < map.size(); ++p) {
        const double weight = (5 - map[p]) * 2 * std::numbers::ln10;
        that(std::abs(weight - expected[p]) < 1e-4, "the map of the worked example");
    }
    auto found = test.regions(0, 1e9);
    that(found.size() == 4, "four regions");
    found = test.regions(0, -14 / (2 * std::numbers::ln10));
    std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.area < b.area; });
    that(found.size() == 2 && found[0].level == 20 && found[1].level == 5, "two of them significant");
    const usf::Region& left = found[1];
    that(left.top == 1 && left.left == 1 && left.bottom == 3 && left.right == 3, "box");
    that(std::abs(left.row - 4 / 3.) < 1e-12 && std::abs(left.column - 4 / 3.) < 1e-12, "centroid");

    std::vector<double> counts(u.size() + 1);
    for (std::size_t r = 0; r < counts.size(); ++r) counts[r] = 100. * static_cast<double>(r);
    test.run(u.data(), 3, 11, tail, counts);  // a price per pixel: only single pixels are left
    for (const usf::Region& r : test.regions(0, 1e9)) that(r.area == 1, "counts by size are used");
    test.write_map(1000, 0, map.data());
    that(std::all_of(map.begin(), map.end(), [](float v) { return v == 0; }), "nothing is above the ceiling");
}

// Reusing a workspace for maps of any size changes nothing.
void workspace_is_reused() {
    std::mt19937 generator(1);
    std::chi_squared_distribution<double> chi2(8);
    usf::RegionTest<double> shared;
    const usf::Tail tail(8, 1, usf::TailKind::chernoff);
    for (const auto& [height, width] : {std::pair{40, 30}, {1, 1}, {1, 50}, {70, 3}, {90, 90}, {2, 2}}) {
        std::vector<double> u(height * width);
        for (double& value : u) value = chi2(generator);
        std::vector<float> first(u.size()), second(u.size());
        shared.run(u.data(), height, width, tail, {});
        shared.write_map(3, 3, first.data());
        usf::RegionTest<double> fresh;
        fresh.run(u.data(), height, width, tail, {});
        fresh.write_map(3, 3, second.data());
        same(first, second, "the workspace leaves no trace");
    }
}

}  // namespace nfa_test

int test_nfa(int, char*[]) {
    using namespace nfa_test;
    prune_and_merge_by_hand();
    small_trees();
    whole_map();
    workspace_is_reused();
    return failures != 0;
}
