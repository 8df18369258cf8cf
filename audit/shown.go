package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"cal/internal/redact"
	"cal/nucleus"
)

// maxShown is how many bytes of arguments an entry shows.
const maxShown = 4 << 10

// Shown is v as an entry shows it: canonical JSON of at most 4 KiB. What lies
// under a key that names a secret, text in the form of a known token, and a run of
// characters that looks random are replaced by "[redacted]". What is too long is
// cut, and says how much is missing. Shown of what Shown returned is the same again.
// A value that is not JSON is shown as the reason. What an action does is bound by
// its digest, not by this.
func Shown(v any) json.RawMessage {
	raw, err := nucleus.Canonical(v)
	if err != nil {
		return mustText(fmt.Sprintf("[not shown: %v]", err))
	}
	var value any
	dec := json.NewDecoder(strings.NewReader(string(raw)))
	dec.UseNumber()
	if err := dec.Decode(&value); err != nil {
		return mustText(fmt.Sprintf("[not shown: %v]", err))
	}
	value, _ = redact.Value(value)
	for limit := maxShown; limit >= 16; limit /= 2 {
		shown, err := nucleus.Canonical(cut(value, limit))
		if err == nil && len(shown) <= maxShown {
			return shown
		}
	}
	return mustText(fmt.Sprintf("[cut: %d bytes]", len(raw)))
}

// signed are the members of data, by kind, that are shown as they are, for they are signatures,
// public keys, or bound by a digest that the log shows.
var signed = map[string][]string{
	nucleus.KindPodStart:     {"outcome_key", "approvers"},
	nucleus.KindKeyLoad:      {"keys"},
	nucleus.KindKeyNew:       {"key"},
	nucleus.KindKeyRemove:    {"key"},
	nucleus.KindKeyApprovers: {"approvers", "confirmed"},
	nucleus.KindPolicyLoad:   {"policy"},
	nucleus.KindApprovalUse:  {"tokens"},
	nucleus.KindLogFork:      {"kept", "signed"},
	nucleus.KindLogForget:    {"key", "checkpoint", "witness"},
}

// shownData is what the kind of an entry adds, without secrets and else as it is. What is no
// JSON stays: the entry is refused for it.
func shownData(kind string, raw json.RawMessage) json.RawMessage {
	if len(raw) == 0 {
		return raw
	}
	canonical, err := nucleus.CanonicalJSON(raw)
	if err != nil {
		return raw
	}
	var value any
	dec := json.NewDecoder(bytes.NewReader(canonical))
	dec.UseNumber()
	if dec.Decode(&value) != nil {
		return raw
	}
	kept := map[string]any{}
	object, _ := value.(map[string]any)
	for _, name := range signed[kind] {
		if member, ok := object[name]; ok {
			kept[name] = member
			delete(object, name)
		}
	}
	value, changed := redact.Value(value)
	if !changed {
		return canonical
	}
	maps.Copy(object, kept)
	if canonical, err = nucleus.Canonical(value); err != nil {
		return raw
	}
	return canonical
}

// mustText is a short text as JSON.
func mustText(text string) json.RawMessage {
	text = strings.ToValidUTF8(text[:min(len(text), 512)], "\uFFFD")
	raw, err := nucleus.Canonical(text)
	if err != nil {
		return json.RawMessage(`"[not shown]"`)
	}
	return raw
}

// cutMark begins what says that something is missing.
const cutMark = redact.CutMark

// cut shortens texts to limit bytes, and lists and objects to limit members.
func cut(value any, limit int) any {
	switch v := value.(type) {
	case string:
		return cutText(v, limit)
	case []any:
		keep := v[:min(len(v), limit)]
		short := make([]any, 0, len(keep)+1)
		for _, element := range keep {
			short = append(short, cut(element, limit))
		}
		if n := len(v) - len(keep); n > 0 {
			short = append(short, fmt.Sprintf("%s%d more]", cutMark, n))
		}
		return short
	case map[string]any:
		return cutObject(v, limit)
	}
	return value
}

func cutText(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	end := limit
	for end > 0 && !utf8.RuneStart(text[end]) {
		end--
	}
	return fmt.Sprintf("%s%s%d bytes]", text[:end], cutMark, len(text)-end)
}

func cutObject(object map[string]any, limit int) any {
	short := make(map[string]any, min(len(object), limit)+1)
	for _, key := range sortedKeys(object) {
		if len(short) == limit {
			short[cutMark+"members]"] = len(object) - limit
			break
		}
		short[cutText(key, limit)] = cut(object[key], limit)
	}
	return short
}

func sortedKeys(object map[string]any) []string { return slices.Sorted(maps.Keys(object)) }
