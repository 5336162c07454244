// The ops on transcripts: each holds a path of its own, and is told what others have computed, or something else.
// tests/fuzz/sessions.py says what the operands mean. A transcript must answer as its tokens would.
#include <algorithm>
#include <set>

#include "walk.h"

namespace fuzz {

namespace {
constexpr std::size_t kMostSessions = 5;
constexpr std::ptrdiff_t kMostTold = 100;
}  // namespace

Session* Walk::session(int which) {
  return sessions_.empty() ? nullptr : &sessions_[static_cast<std::size_t>(which) % sessions_.size()];
}

void Walk::tell(Session& session, const std::vector<Symbol>& more) {
  auto& told = session.path.symbols;
  const auto before = std::ssize(told);
  const auto room = std::clamp<std::ptrdiff_t>(kMostTold - before, 0, std::ssize(more));
  told.insert(told.end(), more.begin(), more.begin() + room);
  const Ask all(session.path);
  auto keys = all.prompt().content_keys;
  std::erase_if(keys, [before](const ContentKey& key) { return key.position < before; });
  cache_.extend(session.id, all.prompt().tokens.subspan(before), keys);
  verify_tokens(session);
  checked("extend");
}

void Walk::verify_tokens(const Session& session) const {
  const Ask told(session.path);
  if (!std::ranges::equal(cache_.plain_tokens(session.id), told.prompt().tokens))
    throw Finding("transcript: other tokens than it was told");
}

void Walk::open_session() {
  const Path first = path();
  if (sessions_.size() == kMostSessions) return;
  const auto id = cache_.open_transcript(first.salt);
  sessions_.push_back({id, {first.salt, {}}});
  tell(sessions_.back(), first.symbols);
}

void Walk::extend_session() {
  const int which = input_.byte(), how = input_.byte(), size = input_.byte(), seed = input_.byte();
  Session* session = this->session(which);
  if (session == nullptr) return;
  auto more = fresh(1 + size % 6, seed);
  const auto& told = session->path.symbols;
  const auto recent = std::min(paths_.size(), kRemembered);
  for (std::size_t i = 1; how % 4 != 0 && i <= recent; ++i) {
    const auto& [salt, known] = paths_[paths_.size() - i];
    if (salt != session->path.salt || known.size() <= told.size()) continue;
    if (!std::equal(told.begin(), told.end(), known.begin())) continue;
    more.assign(known.begin() + std::ssize(told), known.end());
    if (how % 4 == 3) more.resize(1 + static_cast<std::size_t>(size) % more.size());
    break;
  }
  tell(*session, more);
}

void Walk::truncate_session() {
  const int which = input_.byte(), where = input_.byte();
  Session* session = this->session(which);
  if (session == nullptr) return;
  const auto told = std::ssize(session->path.symbols);
  const Position by = where >> 1;
  const auto length = where & 1 ? by % (told + 1) : std::max<Position>(told - by % 4, 0);
  cache_.truncate(session->id, length);
  session->path.symbols.resize(length);
  verify_tokens(*session);
  checked("truncate");
}

void Walk::match_session() {
  const Session* session = this->session(input_.byte());
  if (session == nullptr) return;
  const auto match = [&] { return cache_.match(cache_.prompt(session->id)); };
  if (session->path.symbols.empty()) return refused("match: an empty transcript", match);
  const Unchanged before(cache_);
  const auto found = match(), again = match();
  const Ask ask(session->path);
  const auto plain = cache_.match(ask.prompt());
  before.verify(cache_, "match of a transcript");
  for (const Match& each : {found, again}) {
    if (each.length != plain.length || each.kv_length != plain.kv_length || each.reason != plain.reason ||
        each.ways != plain.ways)
      throw Finding("match: a transcript answers otherwise than its tokens\n" + cache_.dump());
  }
  checked("match");
}

void Walk::reserve_session() {
  const Session* session = this->session(input_.byte());
  const auto length = session == nullptr ? 0 : std::ssize(session->path.symbols);
  const auto options = reserve_options(length);
  if (session == nullptr || flights_.size() == kMostFlights) return;
  const auto reserve = [&] { return cache_.reserve(cache_.prompt(session->id), options); };
  if (length == 0) return refused("reserve: an empty transcript", reserve);
  reserved(session->path, options, reserve);
}

void Walk::close_session() {
  const Session* session = this->session(input_.byte());
  if (session == nullptr) return;
  closed_session_ = session->id;
  cache_.close_transcript(session->id);
  sessions_.erase(sessions_.begin() + (session - sessions_.data()));
  checked("close_transcript");
}

}  // namespace fuzz
