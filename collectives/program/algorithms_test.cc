// Proves every algorithm for every operation and group size.
#include "collectives/program/algorithms.h"

#include <chrono>
#include <numeric>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "collectives/program/verifier.h"
#include "gtest/gtest.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr OpKind kKinds[] = {OpKind::kAllReduce, OpKind::kReduceScatter, OpKind::kAllGather, OpKind::kAllToAll,
                             OpKind::kBroadcast, OpKind::kReduce, OpKind::kGather, OpKind::kScatter, OpKind::kBarrier,
                             OpKind::kSparseAllGather, OpKind::kSparseReduceScatter};

// One way to lay out an operation; numbers choose among the possibilities below.
struct Shape {
  int counts = 0;    // 0: uneven with zeros, 1: equal, 2: all on one rank, 3: nothing.
  int in_place = 0;  // 0: no, 1: yes, 2: on every other rank.
  int topology = 0;
  int64_t piece = 0;
};

Topology TopologyOf(int number, int size) {
  Topology t;
  for (int r = 0; r < size; ++r) {
    switch (number) {
      case 1: t.host.push_back(r * 3 < size ? 7 : 2); break;  // Two hosts, uneven, numbered the other way round.
      case 2: t.host.push_back(r % 4); break;
      case 3: t.host.push_back(r < 2 ? 0 : 1 + (r - 2) / 3); break;
      default: t.host.push_back(0);
    }
  }
  if (number >= 2) {
    t.order.resize(size);
    std::iota(t.order.begin(), t.order.end(), 0);
    std::shuffle(t.order.begin(), t.order.end(), std::mt19937(static_cast<unsigned>(size)));
  }
  return t;
}

int64_t CountOf(int counts, int i, int size) {
  switch (counts) {
    case 0: return (i * 7 + 3) % 4;
    case 1: return 2;
    case 2: return i == size / 2 ? 5 : 0;
    default: return 0;
  }
}

int64_t ElementsOf(int counts, int size) {
  switch (counts) {
    case 0: return size <= 24 ? 64 * size + 7 : size <= 64 ? 64 * 5 + 3 : 64 * 2 + 3;
    case 1: return 16 * std::min(size, 48);
    case 2: return 1;
    default: return 0;
  }
}

std::vector<SparseMove> MovesOf(int size) {
  std::vector<SparseMove> moves;
  std::mt19937 random(static_cast<unsigned>(size));
  for (int c = 0; c < 7; ++c) {
    if (c == 2) continue;  // It stays where it is.
    SparseMove move{.chunk = c, .owner = static_cast<int>(random() % size)};
    for (int r = 0; r < size; ++r) {
      if (r != move.owner && c != 3 && random() % (c + 1) == 0) move.holders.push_back(r);
    }
    moves.push_back(move);
  }
  return moves;
}

std::vector<Problem> ProblemsOf(OpKind kind, int size, int root, const Shape& shape, const Topology* topology) {
  std::vector<Problem> problems(size);
  for (int r = 0; r < size; ++r) {
    Problem& p = problems[r];
    p.kind = kind;
    p.rank = r;
    p.size = size;
    p.root = root;
    p.piece = shape.piece;
    p.topology = topology;
    p.lending = true;
    p.in_place = shape.in_place == 1 || (shape.in_place == 2 && r % 2 == 0);
    switch (kind) {
      case OpKind::kAllReduce:
      case OpKind::kBroadcast:
      case OpKind::kReduce:
        p.elements = ElementsOf(shape.counts, size);
        break;
      case OpKind::kAllToAll:
        p.in_place = false;
        p.even = shape.counts == 1 || shape.counts == 3;
        for (int i = 0; i < size; ++i) {
          p.counts.push_back(CountOf(shape.counts, shape.counts == 0 ? r + 3 * i : i, size));
          p.recv_counts.push_back(CountOf(shape.counts, shape.counts == 0 ? i + 3 * r : r, size));
        }
        break;
      case OpKind::kSparseAllGather:
      case OpKind::kSparseReduceScatter:
        for (int c = 0; c < 7; ++c) p.counts.push_back(shape.counts == 3 ? 0 : c * 5 % 7);
        p.moves = MovesOf(size);
        break;
      case OpKind::kBarrier:
        break;
      default:
        for (int i = 0; i < size; ++i) p.counts.push_back(CountOf(shape.counts, i, size));
    }
  }
  return problems;
}

bool HasRoot(OpKind kind) {
  return kind == OpKind::kBroadcast || kind == OpKind::kReduce || kind == OpKind::kGather || kind == OpKind::kScatter;
}

// Small groups: all shapes. Larger ones: shapes that take turns, so that each comes with every algorithm many times.
std::vector<Shape> ShapesOf(OpKind kind, int size) {
  // Every algorithm applies to it.
  std::vector<Shape> shapes = {{.counts = 1, .in_place = size % 3, .topology = 1 + size % 3, .piece = size <= 64 ? size % 2 * 7 : 0}};
  int turn = size;
  for (int counts = 0; counts < 4; ++counts) {
    for (int in_place = 0; in_place < 3; ++in_place) {
      for (int topology = 0; topology < 4; ++topology) {
        for (int64_t piece : {0, 3, 21}) {
          ++turn;
          const int every = size <= 6 ? 1 : size <= 16 ? 7 : size <= 64 ? 23 : 61;
          if (turn % every != 0) continue;
          shapes.push_back({counts, in_place, topology, size <= 24 ? piece : size <= 64 ? 5 * piece : 17 * piece});
        }
      }
    }
  }
  if (kind == OpKind::kBarrier) shapes.resize(std::min<size_t>(shapes.size(), 4));
  return shapes;
}

std::vector<int> RootsOf(OpKind kind, int size) {
  if (!HasRoot(kind)) return {0};
  std::vector<int> roots;
  for (int r = 0; r < size; ++r) {
    if (size <= 16 || r == 0 || r == 1 || r == size / 2 || r == size - 1) roots.push_back(r);
  }
  return roots;
}

absl::Status Prove(const Algorithm& algorithm, const std::vector<Problem>& problems) {
  std::vector<Program> programs;
  for (const Problem& p : problems) programs.push_back(algorithm.make(p));
  return Verify(problems, programs, algorithm.index_order ? ReduceOrder::kIndex : ReduceOrder::kAny);
}

// Proves all algorithms of a kind for groups of `size`, and returns how many programs that were.
int ProveAll(OpKind kind, int size) {
  int proved = 0;
  std::set<std::string_view> names;  // Of those that had something to do.
  const std::vector<int> roots = RootsOf(kind, size);
  int turn = 0;
  for (const Shape& shape : ShapesOf(kind, size)) {
    const Topology topology = TopologyOf(shape.topology, size);
    ++turn;
    for (size_t i = 0; i < roots.size(); ++i) {
      // All shapes with some root, all roots with some shape.
      if (size > 5 && HasRoot(kind) && (turn + i) % 3 != 0) continue;
      const std::vector<Problem> problems =
          ProblemsOf(kind, size, roots[i], shape, shape.topology == 0 ? nullptr : &topology);
      for (const Algorithm& algorithm : Algorithms()) {
        if (!algorithm.applies(problems[0])) continue;
        const absl::Status status = Prove(algorithm, problems);
        if (!status.ok()) {
          ADD_FAILURE() << algorithm.name << " " << OpKindName(kind) << ", " << size << " ranks, root " << roots[i]
                        << ", counts " << shape.counts << ", in place " << shape.in_place << ", topology "
                        << shape.topology << ", piece " << shape.piece << ": " << status.message();
          return proved;
        }
        ++proved;
        if (shape.counts <= 1) names.insert(algorithm.name);
      }
    }
  }
  const Topology topology = TopologyOf(2, size);
  const Problem all = ProblemsOf(kind, size, 0, {.counts = 1}, &topology)[0];
  for (const Algorithm& algorithm : Algorithms()) {
    if (algorithm.applies(all)) {
      EXPECT_TRUE(names.contains(algorithm.name)) << algorithm.name << " " << OpKindName(kind) << ", " << size << " ranks";
    }
  }
  return proved;
}

class EveryAlgorithm : public ::testing::TestWithParam<OpKind> {};

TEST_P(EveryAlgorithm, IsRightInGroupsOf1To16) {
  for (int size = 1; size <= 16; ++size) EXPECT_GT(ProveAll(GetParam(), size), 0);
}

TEST_P(EveryAlgorithm, IsRightInGroupsOf17To48) {
  for (int size = 17; size <= 48; ++size) EXPECT_GT(ProveAll(GetParam(), size), 0);
}

TEST_P(EveryAlgorithm, IsRightInGroupsOf49To64) {
  for (int size = 49; size <= 64; ++size) EXPECT_GT(ProveAll(GetParam(), size), 0);
}

TEST_P(EveryAlgorithm, IsRightInLargeGroups) {
  for (int size : {96, 128, 255, 256}) EXPECT_GT(ProveAll(GetParam(), size), 0);
}

INSTANTIATE_TEST_SUITE_P(Programs, EveryAlgorithm, ::testing::ValuesIn(kKinds),
                         [](const auto& info) { return std::string(OpKindName(info.param)); });

TEST(Algorithms, SendAndReceiveAreOneMessageOrItsPieces) {
  for (int64_t elements : {0, 1, 10}) {
    for (int64_t piece : {0, 4}) {
      std::vector<Problem> problems(2);
      for (int r = 0; r < 2; ++r) {
        problems[r] = {.kind = r == 0 ? OpKind::kSend : OpKind::kReceive, .rank = r, .size = 2, .root = 1 - r,
                       .elements = elements, .piece = piece};
      }
      const Algorithm& direct = **FindAlgorithm("direct", problems[0]);
      EXPECT_TRUE(Prove(direct, problems).ok()) << Prove(direct, problems);
    }
  }
}

TEST(Algorithms, AreFoundByNameWhereTheyApply) {
  Problem p{.kind = OpKind::kBroadcast, .size = 3};
  EXPECT_EQ((*FindAlgorithm("ring", p))->name, "ring");
  EXPECT_EQ(FindAlgorithm("bruck", p).status().message(), "algorithm bruck cannot do broadcast of 3 ranks like this");
  EXPECT_EQ(FindAlgorithm("magic", p).status().message(), "no algorithm is called magic");
}

TEST(Algorithms, TwoLevelsCrossHostsOncePerHost) {
  const Topology topology = TopologyOf(2, 16);
  std::vector<Problem> problems = ProblemsOf(OpKind::kSparseAllGather, 16, 0, {}, &topology);
  for (Problem& p : problems) {
    p.counts = {10};
    p.moves = {{.chunk = 0, .owner = 5, .holders = {0, 1, 2, 3, 4, 8, 9, 12}}};
  }
  int across = 0;
  for (const Problem& p : problems) {
    const Program program = (*FindAlgorithm("two_level", p))->make(p);
    for (const Instruction& i : program.instructions) {
      across += i.code == OpCode::kSend && topology.host[p.rank] != topology.host[i.peer] ? 1 : 0;
    }
  }
  EXPECT_EQ(across, 3);
}

// 64 MiB in pieces of 128 KiB. The bound is loose, for slow machines and -O1; about 60 us were measured.
TEST(Algorithms, AreWrittenQuickly) {
  Problem p{.kind = OpKind::kAllReduce, .rank = 1, .size = 2, .elements = 16 << 20, .in_place = true, .piece = 32 << 10};
  const Algorithm& direct = **FindAlgorithm("direct", p);
  auto best = std::chrono::nanoseconds::max();
  for (int i = 0; i < 20; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const Program program = direct.make(p);
    best = std::min<std::chrono::nanoseconds>(best, std::chrono::steady_clock::now() - start);
    ASSERT_EQ(program.instructions.size(), 256u * 5);
  }
  RecordProperty("nanoseconds", static_cast<int>(best.count()));
  std::printf("direct all_reduce of 64 MiB: %d ns\n", static_cast<int>(best.count()));
  EXPECT_LT(best, std::chrono::milliseconds(2));
}

}  // namespace
}  // namespace shoal
