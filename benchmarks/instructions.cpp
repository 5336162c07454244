// Drives the core without Python so that valgrind can count the instructions of one operation: everything that is to be
// counted runs inside measured(), which callgrind is told to collect in; all else only sets the scene.
// Usage: instructions [OPERATION REPETITIONS]; without arguments it names the operations, with them it prints how often
// memory was allocated inside measured().
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <new>
#include <string>

#include "cache.h"

using namespace hybridcache;

namespace {

constexpr Position kTurn = 832;
bool measuring = false;
long allocations = 0;

[[gnu::noinline]] void measured(const std::function<void()>& operation) {
  measuring = true;
  operation();
  measuring = false;
  asm volatile("" ::: "memory");  // the call must not become a jump: it has to return through here
}

// Qwen3.5-397B with 64-token pages, bfloat16 KV and float32 states.
Options make_options(std::int64_t num_slabs) {
  Options options;
  options.page_bytes = 1966080;
  options.slot_bytes = 192061440;
  options.num_slabs = num_slabs;
  return options;
}

// The same numbers in every run: a linear congruential generator.
struct Random {
  std::uint64_t state;
  Token token() {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<Token>((state >> 33) % 248320);
  }
};

// One conversation, and an engine that serves it.
struct Conversation {
  Cache& cache;
  Random random;
  std::vector<Token> tokens;

  std::span<const Token> prompt() {
    for (int i = 0; i < kTurn; ++i) tokens.push_back(random.token());
    return tokens;
  }

  LeaseId reserve(Position max_new_tokens = 0) {
    return cache.reserve({tokens, "", {}}, {{}, max_new_tokens, -1}).value();
  }

  void launch(LeaseId lease, Position count) {
    cache.launch(std::span(&lease, 1), std::span(&count, 1), {});
    cache.applied(cache.collect().number);
  }

  void commit(LeaseId lease) { cache.commit(std::span(&lease, 1), {}, std::nullopt); }

  void prefill(LeaseId lease) {
    const auto length = static_cast<Position>(tokens.size());
    while (cache.lease(lease).computed < length) {
      launch(lease, length - cache.lease(lease).computed);
      commit(lease);
    }
  }

  void turn() {
    prompt();
    const auto lease = reserve();
    prefill(lease);
    cache.close(lease, Keep::all, false);
  }

  void grow(Position length) {
    while (static_cast<Position>(tokens.size()) < length) turn();
  }
};

// Decoding after its first steps, of which one leaves the boundary at the end of the prompt.
void steadily(int repetitions, const std::function<void()>& step) {
  for (int i = 0; i < 4; ++i) step();
  for (int i = 0; i < repetitions; ++i) measured(step);
}

// One token for one lease: launch, plan, commit.
void decode(Position context, int repetitions) {
  Cache cache(make_options(4096));
  Conversation chain{cache, {1}, {}};
  chain.grow(context);
  chain.prompt();
  const auto lease = chain.reserve(2 * repetitions);
  chain.prefill(lease);
  const Token token = 7;
  steadily(repetitions, [&] {
    chain.launch(lease, 1);
    cache.commit(std::span(&lease, 1), std::span(&token, 1), std::nullopt);
  });
}

// launch, plan and commit of 64 leases.
void decode_batch(int repetitions) {
  Cache cache(make_options(4096));
  std::vector<LeaseId> leases;
  for (std::uint64_t each = 0; each < 64; ++each) {
    Conversation chain{cache, {each}, {}};
    chain.prompt();
    leases.push_back(chain.reserve(2 * repetitions));
    chain.prefill(leases.back());
  }
  const std::vector<Position> counts(64, 1);
  const std::vector<Token> tokens(64, 7);
  steadily(repetitions, [&] {
    cache.launch(leases, counts, {});
    cache.applied(cache.collect().number);
    cache.commit(leases, tokens, std::nullopt);
  });
}

enum class Part { reserve, commit, close };

// One part of each turn of a conversation that begins at `context` tokens.
void turns(Part part, Position context, int repetitions) {
  Cache cache(make_options(4096));
  Conversation chain{cache, {1}, {}};
  chain.grow(context);
  const auto run = [&](Part which, const std::function<void()>& call) {
    if (which == part) {
      measured(call);
    } else {
      call();
    }
  };
  for (int i = 0; i < repetitions; ++i) {
    chain.prompt();
    LeaseId lease = 0;
    run(Part::reserve, [&] { lease = chain.reserve(); });
    chain.launch(lease, kTurn);
    run(Part::commit, [&] { chain.commit(lease); });
    run(Part::close, [&] { cache.close(lease, Keep::all, false); });
  }
}

std::int64_t checkpoints(const Cache& cache) {
  for (const auto& [name, value] : cache.stats()) {
    if (name == "checkpoints") return value;
  }
  throw std::logic_error("stats without checkpoints");
}

// A full arena of conversations of 40 turns; a fork takes a slab, which a checkpoint has to give up.
void evict(int repetitions) {
  Cache cache(make_options(512));
  std::vector<Conversation> chains;
  for (std::uint64_t each = 0; each < 16; ++each) chains.push_back({cache, {each}, {}});
  for (int round = 0; round < 40; ++round) {
    for (auto& chain : chains) chain.turn();
  }
  const std::vector<Token> none{248320};
  const auto parent = cache.reserve({none, "", {}}, {}).value();
  const auto full = checkpoints(cache);
  while (checkpoints(cache) == full) cache.fork(parent).value();
  const auto before = checkpoints(cache);
  for (int i = 0; i < repetitions; ++i) {
    measured([&] { cache.fork(parent).value(); });
  }
  const auto evicted = before - checkpoints(cache);  // now and then a slab for pages is needed, too
  if (evicted < repetitions || evicted > repetitions + repetitions / 16)
    throw std::logic_error("forks of which each was to evict one checkpoint have evicted another number");
}

// A request for all memory, beside open leases and a conversation that could leave.
void refuse(Position context, int repetitions) {
  Cache cache(make_options(4096));
  for (std::uint64_t each = 0; each < 4; ++each) {
    Conversation chain{cache, {each}, {}};
    chain.grow(context);
    chain.reserve();
  }
  Conversation idle{cache, {4}, {}}, asking{cache, {5}, {}};
  idle.turn();
  const auto page_size = cache.options().paging.page_size;
  const auto pages = cache.arena().num_pages() - cache.arena().pages_per_slab();
  const auto more = static_cast<Position>(pages) * page_size - static_cast<Position>(asking.prompt().size());
  for (int i = 0; i < repetitions; ++i) {
    measured([&] {
      if (cache.reserve({asking.tokens, "", {}}, {{}, more, -1}))
        throw std::logic_error("a request for all memory was not refused");
    });
  }
}

const std::map<std::string, std::function<void(int)>> kOperations = {
    {"decode step at 1K", [](int n) { decode(1 << 10, n); }},
    {"decode step at 256K", [](int n) { decode(1 << 18, n); }},
    {"decode step of 64 leases", decode_batch},
    {"reserve of a cached 64K prompt", [](int n) { turns(Part::reserve, 1 << 16, n); }},
    {"commit of 832 at 1K", [](int n) { turns(Part::commit, 1 << 10, n); }},
    {"commit of 832 at 256K", [](int n) { turns(Part::commit, 1 << 18, n); }},
    {"close at 1K", [](int n) { turns(Part::close, 1 << 10, n); }},
    {"close at 256K", [](int n) { turns(Part::close, 1 << 18, n); }},
    {"fork that evicts one", evict},
    {"refused reserve at 1K", [](int n) { refuse(1 << 10, n); }},
    {"refused reserve at 256K", [](int n) { refuse(1 << 18, n); }},
};

}  // namespace

void* operator new(std::size_t bytes) {
  allocations += measuring;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

int main(int argc, char** argv) {
  if (argc == 1) {
    for (const auto& [name, operation] : kOperations) std::puts(name.c_str());
    return 0;
  }
  const auto operation = kOperations.find(argv[1]);
  if (argc != 3 || operation == kOperations.end()) return 2;
  operation->second(std::atoi(argv[2]));
  std::printf("allocations %ld\n", allocations);
  return 0;
}
