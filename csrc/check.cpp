#include "check.h"

#include <algorithm>
#include <set>

#include "radix.h"

namespace hybridcache {

namespace {
std::string hex(const std::string& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (const unsigned char byte : bytes) out += {kDigits[byte >> 4], kDigits[byte & 15]};
  return out;
}
}  // namespace

void Cache::check() const {
  Checker(*this).check();
}
std::string Cache::dump() const {
  return Checker(*this).dump();
}

void Checker::fail(const std::string& invariant, const std::string& what) const {
  throw InvariantError(invariant + ": " + what + "\n" + dump());
}

void Checker::check() {
  pages_.assign(cache_.arena_.num_pages(), {});
  slots_.assign(cache_.arena_.num_slots(), 0);
  for (const auto& [id, lease] : cache_.leases_) visit_lease(*lease);
  for (const auto& [id, pin] : cache_.pins_) {
    ++node_pins_[pin];
    ++checkpoint_pins_[pin];
  }
  visit_tree();
  for (const auto& [id, transcript] : cache_.transcripts_.all()) visit_transcript(*transcript);
  check_pins();
  check_partition();
  check_slabs();
  check_pending();
  cache_.history_.check();
}

// ---------------------------------------------------------------- the tree

void Checker::visit_tree() {
  std::vector<const Node*> left;
  for (const auto& [salt, root] : cache_.tree_.roots()) {
    require(root->salt != nullptr && *root->salt == salt && root->parent == nullptr && root->depth == 0, "I8",
            "a root does not belong to its salt");
    require(!root->children.empty() || root->pins > 0, "I1", "an empty root stays");
    left.push_back(root);
  }
  while (!left.empty()) {
    const Node* node = left.back();
    left.pop_back();
    nodes_.push_back(node);
    visit_node(*node);
    for (const auto& [first, child] : node->children) {
      require(child->parent == node && !child->edge.empty() && child->edge.front() == first, "I2",
              "a child is not where its first token says");
      left.push_back(child);
    }
  }
  require(static_cast<std::int64_t>(nodes_.size()) == cache_.tree_.nodes(), "I1", "nodes are lost");
  require(checkpoints_ == cache_.tree_.checkpoints(), "I1", "checkpoints are lost");
  for (int kind = 0; kind < kKinds; ++kind)
    require(by_kind_[kind] == cache_.tree_.checkpoints(static_cast<Kind>(kind)), "I1", "a kind is miscounted");
  require(checkpoints_ - unpinned_ == cache_.tree_.pinned_checkpoints(), "I5", "pinned checkpoints are miscounted");
  require(unpinned_ == cache_.eviction_.unpinned(), "I7",
          "the order of eviction holds something else than the unpinned checkpoints");
}

void Checker::visit_node(const Node& node) {
  const auto& paging = cache_.paging();
  const auto by_token = [](const auto& a, const auto& b) { return a.first < b.first; };
  require(std::is_sorted(node.children.begin(), node.children.end(), by_token), "I7", "children are not in order");
  if (node.parent != nullptr) {
    require(node.begin() == node.parent->depth, "I2", "a node does not begin where its parent ends");
    require(node.checkpoint || node.pins > 0 || node.children.size() > 1, "I1",
            [&] { return "a node without a support stays at depth " + text(node.depth); });
  }
  require(
      static_cast<Position>(node.pages.size()) == paging.whole(node.depth) - paging.whole(node.begin()), "I11",
      [&] { return "a node at depth " + text(node.depth) + " does not own the pages that become whole on its edge"; });
  for (const PageId page : node.pages) ++pages_[page].node;
  require(node.edge.is_right(cache_.options().small_part), "I2",
          [&] { return "the edge above depth " + text(node.depth) + " is torn"; });
  require(!count_contents(node.edge.all()) || node.has_content, "I8", "a node does not know of its content");
  if (node.checkpoint) visit_checkpoint(node);
}

bool Checker::count_contents(std::span<const Token> tokens) {
  bool any = false;
  for (const Token token : tokens) {
    if (token >= 0) continue;
    ++content_users_[token];
    any = true;
  }
  return any;
}

bool Checker::count_contents(TokenRange tokens) {
  bool any = false;
  for (auto left = tokens; !left.empty(); left = left.rest()) any |= count_contents(left.head());
  return any;
}

void Checker::visit_checkpoint(const Node& node) {
  const auto& checkpoint = *node.checkpoint;
  ++checkpoints_;
  ++by_kind_[index(checkpoint.kind)];
  unpinned_ += checkpoint.pins == 0;
  require(node.depth > 0 && checkpoint.position == node.depth, "I2",
          [&] { return "a checkpoint of " + text(checkpoint.position) + " at " + text(node.depth); });
  require((checkpoint.tail != kNone) == (node.depth > cache_.paging().whole(node.depth) * cache_.paging().page_size),
          "I11", [&] { return "a checkpoint at " + text(node.depth) + " has KV of another length"; });
  require(cache_.eviction_.places(node), "I7",
          [&] { return "a checkpoint at " + text(node.depth) + " has the wrong place in the order of eviction"; });
  require(!cache_.keeps_history() || (checkpoint.record->node == &node && checkpoint.record->depth == node.depth), "I2",
          [&] { return "a checkpoint at " + text(node.depth) + " has the history of another"; });
  ++slots_[checkpoint.slot];
  if (checkpoint.tail == kNone) return;
  ++pages_[checkpoint.tail].tails;
  pages_[checkpoint.tail].pinned_tails += checkpoint.pins > 0;
}

// ---------------------------------------------------------------- leases

void Checker::visit_lease(const Lease& lease) {
  const auto wrong = [&](const char* what) { return [&lease, what] { return "lease " + text(lease.id) + what; }; };
  const auto& paging = cache_.paging();
  const auto& course = lease.course;
  require(0 <= course.start && course.start <= lease.committed && lease.committed <= lease.computed &&
              lease.computed <= lease.capacity(paging.page_size),
          "I4", wrong(" has its cursors out of order"));
  require(!lease.steps.empty() == (lease.computed > lease.committed), "I4", wrong(" has computed what no step covers"));
  require(course.start + static_cast<Position>(lease.tokens.size()) == std::max(lease.committed, course.prompt_length),
          "I4", wrong(" knows tokens that were not read"));
  const auto whole_at = paging.whole_at(paging.whole(lease.committed));
  require(lease.anchor->depth == std::max(whole_at, course.boundary), "I4",
          wrong(" is anchored elsewhere than what it committed"));
  ++node_pins_[lease.anchor];
  if (lease.read != nullptr) ++checkpoint_pins_[lease.read];
  ++slots_[lease.live];
  if (lease.left_behind != kNone) ++slots_[lease.left_behind];
  for (const auto& step : lease.steps) {
    if (step.gone_on) ++slots_[step.write_slot];
    for (const auto& inner : step.checkpoints) ++slots_[inner.slot];
    for (const auto* rows : {&step.rows, &step.kept}) {
      for (const SlotId row : *rows) ++slots_[row];
    }
  }
  count_contents(lease.tokens);
  visit_page_table(lease);
  visit_path(lease);
}

void Checker::visit_page_table(const Lease& lease) {
  const auto written_from = cache_.paging().whole(lease.committed);
  std::vector<PageId> path;
  cache_.tree_.follow_pages(nullptr, lease.anchor, path);
  for (std::size_t i = 0; i < lease.pages.size(); ++i) {
    pages_[lease.pages[i]].lease += lease.owned[i];
    require(lease.owned[i] || static_cast<Position>(i) < written_from, "I5", [&] {
      return "lease " + text(lease.id) + " may write page " + text(i) + " of its table, which is not its own";
    });
    require(lease.owned[i] || path[i] == lease.pages[i], "I11",
            [&] { return "lease " + text(lease.id) + " reads page " + text(i) + " from elsewhere than its path"; });
  }
}

// What the tree holds on the lease's path is what the lease has committed.
void Checker::visit_path(const Lease& lease) const {
  for (const Node* node = lease.anchor; node->depth > lease.course.start; node = node->parent) {
    const auto from = std::max(node->begin(), lease.course.start);
    const auto known = lease.span(from, node->depth);
    require(common_prefix(node->edge.last(known.size()), known) == known.size(), "I4",
            [&] { return "lease " + text(lease.id) + " is anchored below other tokens than it committed"; });
  }
}

// Its anchor lies on a path of its salt whose tokens are its first ones, and the table is that path's.
void Checker::visit_transcript(const Transcript& transcript) {
  const auto wrong = [&](const char* what) { return [&, what] { return "transcript " + text(transcript.id) + what; }; };
  count_contents(transcript.tokens);
  std::vector<PageId> table;
  const Node* node = transcript.anchor;
  if (node != nullptr) {
    require(std::find(nodes_.begin(), nodes_.end(), node) != nodes_.end(), "I1", wrong(" is anchored at no node"));
    require(node->followed && cache_.transcripts_.anchors(node, transcript), "I1", wrong("'s anchor does not know it"));
    require(node->depth <= std::ssize(transcript.tokens), "I2", wrong(" is shorter than the path to its anchor"));
    cache_.tree_.follow_pages(nullptr, node, table);
  }
  require(table == transcript.table, "I1", wrong("'s table is not that of the path to its anchor"));
  for (; node != nullptr; node = node->parent) {
    const auto tokens = std::span<const Token>(transcript.tokens).subspan(node->begin());
    require(common_prefix(node->edge.all(), tokens) == node->edge.size(), "I2",
            wrong(" is anchored on a path of other tokens"));
    require(node->parent != nullptr || *node->salt == transcript.salt, "I8", wrong(" is anchored in another salt"));
  }
}

void Checker::check_pins() {
  for (const Node* node : nodes_) {
    const auto pins = node_pins_.find(node);
    require(node->pins == (pins == node_pins_.end() ? 0 : pins->second), "I1",
            [&] { return "a node at " + text(node->depth) + " has pins that nobody holds"; });
    const auto reads = checkpoint_pins_.find(node);
    const int expected = reads == checkpoint_pins_.end() ? 0 : reads->second;
    require((node->checkpoint ? node->checkpoint->pins : 0) == expected, "I5",
            [&] { return "a checkpoint at " + text(node->depth) + " has pins that nobody holds"; });
  }
  std::set<const Node*> stay;                                         // with a pin at or below
  for (auto node = nodes_.rbegin(); node != nodes_.rend(); ++node) {  // children come first
    if ((*node)->pins > 0) stay.insert(*node);
    if (stay.contains(*node)) stay.insert((*node)->parent);
    require(!(*node)->checkpoint || (*node)->checkpoint->pins == 0 || stay.contains(*node), "I5",
            [&] { return "a node at " + text((*node)->depth) + " may leave and its checkpoint may not"; });
  }
  cache_.history_.each_edge([this](TokenRange edge) { count_contents(edge); });
  std::int64_t pairs = 0;
  for (const auto& [token, users] : content_users_) {
    ++pairs;
    require(cache_.contents_.users(token) == users, "I8", "a (token, content) pair is miscounted");
  }
  require(static_cast<std::int64_t>(cache_.contents_.size()) == pairs, "I8",
          "a (token, content) pair stays that nobody uses");
}

// ---------------------------------------------------------------- the arena

void Checker::check_partition() const {
  const Arena& arena = cache_.arena_;
  std::int64_t tree_pages = 0, loose_pages = 0;
  for (PageId page = 0; page < arena.num_pages(); ++page) {
    const auto& owners = pages_[page];
    const auto wrong = [page](const char* what) { return [page, what] { return "page " + text(page) + what; }; };
    require(owners.lease + owners.node <= 1, "I1", wrong(" is a node's and a lease's, or two of one kind"));
    const PageUse& use = arena.use(page);
    require(owners.lease == use.held && owners.node == use.node && owners.tails == use.tails, "I1",
            wrong(" is used by others than it says"));
    require(owners.pinned_tails == use.pinned_tails, "I5",
            wrong(" is the tail of other pinned checkpoints than it says"));
    tree_pages += use.of_tree();
    loose_pages += use.loose();
  }
  require(tree_pages == arena.tree_pages() && loose_pages == arena.loose_pages(), "I1", "pages are miscounted");
  for (SlotId slot = 0; slot < arena.num_slots(); ++slot) {
    require(slots_[slot] <= 1 && arena.slot_taken(slot) == (slots_[slot] == 1), "I1",
            [&] { return "slot " + text(slot) + " has " + text(slots_[slot]) + " owners"; });
  }
}

void Checker::check_slabs() const {
  const Arena& arena = cache_.arena_;
  std::int64_t taken = 0, free_slabs = 0, with_pages = 0;
  for (std::int32_t slab = 0; slab < arena.page_slabs(); ++slab) {
    std::int64_t used = 0;
    for (auto page = slab * arena.pages_per_slab(); page < slab * arena.pages_per_slab() + arena.capacity(slab); ++page)
      used += arena.use(static_cast<PageId>(page)).taken();
    const bool slot = !arena.fixed() && arena.slot_taken(slab);
    require(arena.used(slab) == used && !(slot && used > 0), "I1",
            [&] { return "slab " + text(slab) + " plays two roles"; });
    require(arena.free_slab_known(slab) == (!slot && used == 0), "I1",
            [&] { return "slab " + text(slab) + " is free and not known to be, or the other way round"; });
    taken += used;
    free_slabs += !slot && used == 0;
    with_pages += used > 0;
  }
  for (SlotId slot = 0; arena.fixed() && slot < arena.num_slots(); ++slot)
    require(arena.free_slot_known(slot) != arena.slot_taken(slot), "I1",
            [&] { return "slot " + text(slot) + " is free and not known to be, or the other way round"; });
  require(with_pages == arena.slabs_with_pages(), "I1", "slabs with pages are miscounted");
  require(taken == arena.taken_pages() && free_slabs == arena.free_slabs(), "I1", "pages or slabs are lost");
}

// What a pending plan names is in use.
void Checker::check_pending() const {
  const auto taken_slot = [&](SlotId slot) {
    require(cache_.arena_.slot_taken(slot), "I10", [&] { return "a pending plan names the free slot " + text(slot); });
  };
  const auto taken_page = [&](PageId page) {
    require(cache_.arena_.use(page).taken(), "I10", [&] { return "a pending plan names the free page " + text(page); });
  };
  for (const Plan& plan : cache_.pending_) {
    for (const SlotId slot : plan.zero_slots) taken_slot(slot);
    for (const PageId page : plan.zero_pages) taken_page(page);
    for (const auto& copy : plan.copy_slots) taken_slot(copy.source), taken_slot(copy.destination);
    for (const auto& copy : plan.copy_pages) taken_page(copy.source), taken_page(copy.destination);
  }
}

// ---------------------------------------------------------------- printing

void Checker::print_node(std::string& out, const Node& node, int indent) const {
  out += std::string(2 * indent, ' ') + "[" + text(node.begin()) + ", " + text(node.depth) + ")";
  std::vector<Token> first(std::min<std::size_t>(node.edge.size(), 8));
  node.edge.all().first(first.size()).copy_to(first.data());
  for (std::size_t i = 0; i < first.size(); ++i) out += (i == 0 ? " tokens " : " ") + text(first[i]);
  if (node.edge.size() > 8) out += " ...";
  out += " pages " + text(static_cast<std::int64_t>(node.pages.size()));
  if (node.pins > 0) out += " pins " + text(node.pins);
  if (node.checkpoint) {
    const auto& checkpoint = *node.checkpoint;
    out += std::string(" * ") + name(checkpoint.kind) + " slot " + text(checkpoint.slot);
    if (checkpoint.tail != kNone) out += " tail " + text(checkpoint.tail);
    out += " tick " + text(static_cast<std::int64_t>(checkpoint.tick)) + (checkpoint.superseded ? " superseded" : "");
    if (const auto& order = cache_.eviction_.order(); order.holds(node) && cache_.keeps_history())
      out += " worth " + std::to_string(order.key(node).first);
    if (checkpoint.pins > 0) out += " pinned " + text(checkpoint.pins);
  }
  out += "\n";
}

void Checker::print_lease(std::string& out, const Lease& lease) const {
  out += "lease " + text(lease.id) + (lease.resting != 0 ? " resting" : "") + " start " + text(lease.course.start) +
         " committed " + text(lease.committed) + " computed " + text(lease.computed) + " prompt " +
         text(lease.course.prompt_length) + " boundary " + text(lease.course.boundary) + " live " + text(lease.live) +
         (lease.fresh ? " fresh" : "") + " pages";
  for (std::size_t i = 0; i < lease.pages.size(); ++i) out += " " + text(lease.pages[i]) + (lease.owned[i] ? "o" : "");
  out += "\n";
}

std::string Checker::dump() const {
  const Arena& arena = cache_.arena_;
  std::string out = "pages " + text(arena.taken_pages()) + " of " + text(arena.num_pages()) + " taken, slots " +
                    text(arena.taken_slots()) + " of " + text(arena.num_slots()) + ", free slabs " +
                    text(arena.free_slabs()) + ", checkpoints " + text(cache_.tree_.checkpoints()) + "\n";
  out += std::string("policy ") + kPolicyNames[static_cast<int>(cache_.options().policy)] + ", " +
         text(cache_.cached_bytes()) + " bytes cached of " + text(arena.size_in_pages() * cache_.options().page_bytes) +
         "\n";
  for (const auto& [salt, root] : cache_.tree_.roots()) {
    out += "salt '" + hex(salt) + "'\n";
    std::vector<std::pair<const Node*, int>> left = {{root, 1}};
    while (!left.empty()) {
      const auto [node, indent] = left.back();
      left.pop_back();
      if (node->parent != nullptr) print_node(out, *node, indent);
      for (auto child = node->children.rbegin(); child != node->children.rend(); ++child)
        left.push_back({child->second, indent + 1});
    }
  }
  for (const auto& [id, lease] : cache_.leases_) print_lease(out, *lease);
  for (const auto& [id, transcript] : cache_.transcripts_.all()) {
    out += "transcript " + text(id) + ": " + text(std::ssize(transcript->tokens)) + " tokens\n";
  }
  return out;
}

}  // namespace hybridcache
