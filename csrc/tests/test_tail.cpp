#include <cmath>
#include <cstdio>
#include <limits>
#include <numbers>
#include <stdexcept>

#include "check.hpp"
#include "tail.hpp"

namespace tail_test {

void near(double found, double expected, double relative, const char* what) {
    if (std::abs(found - expected) <= relative * std::abs(expected)) return;
    std::printf("%s: expected %.17g, found %.17g\n", what, expected, found);
    ++failures;
}

// ln Q(a, a lambda), from mpmath with 40 digits.
struct Known {
    double a, lambda, value;
};
constexpr Known known[] = {
    {0.5, 0.25, -0.4827645810336733},       {0.5, 1, -1.1478744644493182},
    {0.5, 50, -27.200889545537434},         {1, 0.125, -0.125},
    {4, 0.75, -0.43505064253846326},        {8, 1, -0.79194967051533501},
    {8, 1.125, -1.1273298251460999},        {8.5, 3, -10.430922426200932},
    {32, 0.5, -0.00027623794938682475},     {32, 1.0625, -1.0709092891367613},
    {408, 0.75, -1.6170934776726061e-8},    {408, 0.984375, -0.48095144044695098},
    {408, 1, -0.70640187276246034},         {408, 1.015625, -0.99283376111845279},
    {408, 1.5, -41.816129925719106},        {408, 50, -18403.711261489024},
    {2048, 0.9375, -0.0019765338143572284}, {2048, 1, -0.69904150878514335},
    {2048, 1.03125, -2.5294846280380208},   {2048, 2, -633.1668375922569},
    {2048, 50, -92348.800004065788},
};

void direct_values() {
    for (const Known& k : known) near(usf::log_upper_gamma(k.a, k.lambda), k.value, 1e-11, "log_upper_gamma");
    that(usf::log_upper_gamma(3, 0) == 0, "all of the mass is above zero");
    near(usf::log_upper_gamma(1, 700), -700, 1e-14, "the exponential distribution");
    near(usf::log_upper_gamma(1, 1e6), -1e6, 1e-14, "far below the smallest double");
}

void stirling() {
    for (double a : {0.05, 0.5, 1.0, 7.3, 15.99, 16.0, 100.0, 1e4}) {
        const double formula = (a - 0.5) * std::log(a) - a + 0.5 * std::log(2 * std::numbers::pi);
        const double error = std::abs(formula + usf::stirling_remainder(a) - std::lgamma(a));
        that(error <= 4e-15 * (1 + std::abs(formula)), "Stirling's formula and its remainder");
    }
}

// The table follows the direct evaluation everywhere, across the joints of its intervals and past its ends.
void tabulated_values() {
    for (double dof : {0.02, 0.3, 1.0, 2.0, 3.5, 7.0, 8.0, 64.0, 816.0, 4096.0, 20000.5}) {
        const double scale = 0.37;
        const usf::Tail tail(dof, scale, usf::TailKind::exact), bound(dof, scale, usf::TailKind::chernoff);
        double before = 0;
        for (double lambda = 1e-3; lambda < 200; lambda *= 1.0173) {
            const double t = lambda * dof * scale, found = tail(t);
            const double expected = usf::log_upper_gamma(dof / 2, t / (dof * scale)) * std::numbers::log10e;
            that(std::abs(found - expected) <= 1e-9 * std::abs(expected) + 2e-12, "the table is right");
            that(found <= bound(t) + 1e-12, "the bound is above the probability");
            that(found <= before + 2e-12 && found <= 0, "the tail decreases from 0");
            before = found;
        }
    }
}

void bound_values() {
    const usf::Tail tail(816, 1, usf::TailKind::chernoff);
    for (double t : {0.0, 1.0, 408.0, 742.0, 816.0}) that(tail(t) == 0, "no bound at and below the mean");
    near(tail(1632), 408 * (1 + std::log(2.0) - 2) / std::log(10.0), 1e-14, "twice the mean");
    near(tail(816 * (1 + 1e-7)), -408 * 0.5e-14 / std::log(10.0), 1e-6, "just above the mean");
}

void the_last_levels() {
    for (const auto kind : {usf::TailKind::chernoff, usf::TailKind::exact})
        for (double dof : {0.5, 8.0})
            for (double scale : {1e-300, 1e-10, 1.0}) {
                const usf::Tail tail(dof, scale, kind);
                that(tail(1e30) <= -1e25, "far above the mean");
                that(tail(1e308) <= tail(1e300) && tail(1e300) <= tail(1e30),
                     "the tail decreases to the end");
            }
}

void bad_parameters() {
    const auto refused = [](double dof, double scale) {
        CHECK_THROWS(usf::Tail(dof, scale, usf::TailKind::exact));
    };
    for (double bad : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity(), 1e-310}) {
        refused(bad, 1);
        refused(1, bad);
    }
    refused(1e-200, 1e-200);
    refused(-1e-3, -1e-3);
    refused(1e17, 1);
    refused(1e-310, 1e10);
}

}  // namespace tail_test

int test_tail(int, char*[]) {
    using namespace tail_test;
    direct_values();
    stirling();
    tabulated_values();
    bound_values();
    the_last_levels();
    bad_parameters();
    return failures != 0;
}
