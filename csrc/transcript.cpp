#include "transcript.h"

#include <algorithm>

namespace hybridcache {

TranscriptId Transcripts::open(const std::string& salt) {
  auto transcript = std::make_unique<Transcript>();
  transcript->id = next_++;
  transcript->salt = salt;
  count_.add();
  return (all_[transcript->id] = std::move(transcript))->id;
}

void Transcripts::close(TranscriptId id) {
  Transcript& transcript = at(id);
  leave(transcript);
  contents_.release(transcript.tokens);
  all_.erase(id);
  count_.add(-1);
}

Transcript& Transcripts::at(TranscriptId id) const {
  const auto it = all_.find(id);
  if (it == all_.end())
    throw StateError("transcript: number " + std::to_string(id) + " is closed, an open one was expected");
  return *it->second;
}

void Transcripts::extend(Transcript& transcript, std::span<const Token> tokens, std::span<const ContentKey> keys) {
  const auto before = static_cast<Position>(transcript.tokens.size());
  transcript.tokens.insert(transcript.tokens.end(), tokens.begin(), tokens.end());
  for (const auto& key : keys) {
    auto& token = transcript.tokens[key.position];
    token = contents_.acquire(tokens[key.position - before], key.content);
    transcript.has_content = true;
  }
}

void Transcripts::truncate(Transcript& transcript, Position length) {
  Node* node = transcript.anchor;
  while (node != nullptr && node->depth > length) node = node->parent;
  if (node != transcript.anchor) move_up(transcript, node);
  contents_.release(std::span(transcript.tokens).subspan(length));
  transcript.tokens.resize(length);
}

std::vector<Token> Transcripts::plain_tokens(const Transcript& transcript) const {
  auto plain = transcript.tokens;
  for (Token& token : plain) {
    if (token < 0) token = contents_.token(token);
  }
  return plain;
}

Walk Transcripts::walk(Transcript& transcript, Position limit) {
  Node* from = transcript.anchor == nullptr ? tree_.find_root(transcript.salt) : transcript.anchor;
  Walk walk = tree_.walk(from, transcript.tokens, limit);
  if (walk.last != nullptr) move_down(transcript, walk.last);
  for (Node* above = from; walk.resume == nullptr && above != nullptr; above = above->parent) {
    if (above->checkpoint && above->depth <= limit) walk.resume = above;
  }
  return walk;
}

// ---------------------------------------------------------------- the anchor

// REQUIRES: the anchor, if there is one, lies on the path to `last`.
void Transcripts::move_down(Transcript& transcript, Node* last) {
  if (last == transcript.anchor) return;
  tree_.follow_pages(transcript.anchor, last, transcript.table);
  leave(transcript);
  settle_at(transcript, last);
}

// REQUIRES: `node` lies on the path to the anchor, or is null.
void Transcripts::move_up(Transcript& transcript, Node* node) {
  leave(transcript);
  transcript.table.resize(node == nullptr ? 0 : paging_.whole(node->depth));
  if (node != nullptr) settle_at(transcript, node);
}

void Transcripts::leave(Transcript& transcript) {
  Node* node = std::exchange(transcript.anchor, nullptr);
  if (node == nullptr) return;
  const auto it = anchored_.find(node);
  std::erase(it->second, &transcript);
  if (!it->second.empty()) return;
  anchored_.erase(it);
  node->followed = false;
}

void Transcripts::settle_at(Transcript& transcript, Node* node) {
  transcript.anchor = node;
  node->followed = true;
  anchored_[node].push_back(&transcript);
}

void Transcripts::going(Node& node) {
  while (node.followed) move_up(*anchored_.at(&node).back(), node.parent);
}

bool Transcripts::anchors(const Node* node, const Transcript& transcript) const {
  const auto it = anchored_.find(node);
  return it != anchored_.end() && std::count(it->second.begin(), it->second.end(), &transcript) == 1;
}

}  // namespace hybridcache
