// How far a prompt is known, how far it could resume, and why not further. Nothing here changes anything (I9).
#include <algorithm>

#include "cache.h"

namespace hybridcache {

void Cache::check_prompt(const Prompt& prompt) const {
  const auto length = static_cast<Position>(prompt.tokens.size());
  if (length == 0) refuse("tokens: empty, at least one token was expected");
  check_keys(prompt.content_keys, 0, length);
}

void Cache::check_keys(std::span<const ContentKey> keys, Position first, Position end) const {
  Position last = first - 1;
  for (const auto& key : keys) {
    if (key.position <= last || key.position >= end) {
      refuse("content_keys: position " + text(key.position) + ", expected ascending positions in [" + text(first) +
             ", " + text(end) + ")");
    }
    last = key.position;
  }
}

// Its tokens as the tree knows them; `mapped` is where they lie if content takes the place of some.
std::span<const Token> Cache::symbols(const Prompt& prompt, std::vector<Token>& mapped) const {
  if (prompt.content_keys.empty()) return prompt.tokens;
  mapped.assign(prompt.tokens.begin(), prompt.tokens.end());
  for (const auto& key : prompt.content_keys) mapped[key.position] = contents_.find(mapped[key.position], key.content);
  return mapped;
}

// How far the prompt is known, whose symbols these are. Refuses ids that are none.
Walk Cache::walk(const Prompt& prompt, std::span<const Token> symbols, Position limit) const {
  if (prompt.transcript != nullptr) return transcripts_.walk(*prompt.transcript, limit);
  const Node* root = tree_.find_root(prompt.salt);
  if (contents_.size() == 0 && prompt.content_keys.empty()) {
    const auto walk = tree_.walk(root, symbols, limit);
    check_ids(prompt.tokens.subspan(walk.matched), "tokens", walk.matched);  // what equals the tree's tokens is right
    return walk;
  }
  check_ids(prompt.tokens, "tokens");
  return tree_.walk(root, symbols, limit);
}

Match Cache::to_match(const Walk& walk, Position length) const {
  const auto resumed = walk.resume == nullptr ? 0 : walk.resume->depth;
  Reason reason = Reason::no_checkpoint;
  if (walk.matched == 0) {
    reason = Reason::cold;
  } else if (resumed == length - 1) {
    reason = Reason::complete;
  } else if (walk.checkpoint_at_end) {
    reason = Reason::remainder;
  } else if (resumed == walk.matched) {
    reason = Reason::unknown;
  }
  return {resumed, walk.matched, reason, walk.ways};
}

// The boundary beyond match.length that would have helped: one that was there, else one as deep as the prompt is known.
std::optional<Missed> Cache::missed(const Match& match, Position length, const Reach& reach) const {
  if (reach.left != nullptr) return history_.missed(reach);
  const auto known = std::min(std::max(match.kv_length, reach.known), length - 1);
  return known > match.length ? std::optional(Missed{.position = known}) : std::nullopt;
}

Match Cache::match(const Prompt& prompt) const {
  check_prompt(prompt);
  const auto length = static_cast<Position>(prompt.tokens.size());
  std::vector<Token> mapped;
  const auto symbols = this->symbols(prompt, mapped);
  const auto walk = this->walk(prompt, symbols, length - 1);
  auto match = to_match(walk, length);
  Reach reach;
  if (keeps_history()) {
    Record* start = walk.resume == nullptr ? nullptr : walk.resume->checkpoint->record;
    reach = history_.reach(prompt.salt, start, symbols.subspan(match.length));
  }
  match.missed = missed(match, length, reach);
  return match;
}

}  // namespace hybridcache
