package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"cal/nucleus"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// VerifyReceiptOptions say what is believed. Key is required.
type VerifyReceiptOptions struct {
	Key       string   // of the log: what VerifierKey returned
	Witnesses []string // keys of witnesses, all of which must have cosigned the checkpoint
}

// Receipt is what a receipt, or a proof of one entry, proves: each of the entries is in
// the log at its place. Where Begins and Linked hold they are all that the log has of the
// session up to the last one, by the word of the log itself, which the verification of the
// whole log checks; with Ends there is none after it. Else Between tells: with none, nothing
// was left out between the first and the last.
type Receipt struct {
	Origin     string            `json:"origin"`
	Size       int64             `json:"size"` // entries under the checkpoint
	Root       string            `json:"root"` // base64
	Checkpoint string            `json:"checkpoint"`
	Session    string            `json:"session,omitempty"` // empty for a proof of one entry
	First      int64             `json:"first"`
	Last       int64             `json:"last"`
	Between    int64             `json:"between_not_shown"`  // entries of the log between the first and the last
	Begins     bool              `json:"begins"`             // the first entry begins the session
	Linked     bool              `json:"linked"`             // each other one names the one before it
	Ends       bool              `json:"ends"`               // the last one ends the session
	Open       []int64           `json:"intents_open"`       // intents with a permit whose outcome is not shown
	Signed     int               `json:"outcomes_signed"`    // outcomes whose machine's signature was checked
	Unchecked  int               `json:"outcomes_unchecked"` // outcomes on the node's word alone: not signed, or by a key that is not in the receipt
	Witnesses  []Witnessed       `json:"witnesses"`
	Others     []string          `json:"signatures_not_checked"` // names under the checkpoint whose keys were not given
	Entries    []json.RawMessage `json:"entries"`                // canonical, as they were hashed
}

// Witnessed is a cosignature that was checked.
type Witnessed struct {
	Name string `json:"name"`
	Unix int64  `json:"unix"` // seconds, by the witness's clock
}

// VerifyReceipt checks a receipt or a proof with nothing but the keys. A refusal is a
// *ReceiptError and says of what kind; another error says that a key is unusable. Input
// of any size is safe.
func VerifyReceipt(raw []byte, o VerifyReceiptOptions) (*Receipt, error) {
	if IsProof(raw) {
		return verifyProof(raw, o)
	}
	s, err := openReceipt(raw)
	if err != nil {
		return nil, err
	}
	v, err := believe(s.note, o)
	if err != nil {
		return nil, err
	}
	if s.last >= v.Size || s.count > v.Size {
		return nil, refuse(Extra, "%d entries up to %d are beyond the checkpoint of %d entries", s.count, s.last, v.Size)
	}
	r, err := s.read()
	if err != nil {
		return nil, err
	}
	leaves := make([]tlog.Hash, len(r.entries))
	for i, entry := range r.entries {
		leaves[i] = tlog.RecordHash(entry)
	}
	root, need, ok := fold(r.indexes, leaves, r.hashes, v.Size)
	switch {
	case !ok && len(r.hashes) < need:
		return nil, refuse(Missing, "these entries need %d hashes, %d are there: an entry or a hash was taken out", need, len(r.hashes))
	case !ok:
		return nil, refuse(Extra, "these entries need %d hashes, %d are there: an entry or a hash was put in", need, len(r.hashes))
	case root.String() != v.Root:
		return nil, refuse(Changed, "entries and hashes lead to root %s, the checkpoint says %s", root, v.Root)
	}
	v.Session = r.session
	orphans, err := v.read(r.indexes, r.entries)
	if err == nil {
		err = v.follow()
	}
	if err == nil && v.Begins && v.Linked && len(orphans) > 0 {
		err = refuse(BadOutcome, "entry %d is the outcome of a permit that no intent before it has", orphans[0])
	}
	return v, err
}

// follow checks that the entries of a session name one another: what was taken out is named
// by the one after it.
func (v *Receipt) follow() error {
	before := int64(-1)
	v.Linked = true
	for i, raw := range v.Entries {
		g, err := look(raw)
		if err != nil {
			return malformed("%v: %.60q", err, raw)
		}
		switch {
		case g.prev >= 0 && g.prev != before:
			return refuse(Missing, "entry %d names entry %d as the one before it in its session, the receipt has %s", g.seq, g.prev, entryOrNone(before))
		case g.prev < 0 && i > 0:
			v.Linked = false
		case i == 0:
			v.Begins = g.kind == nucleus.KindPodCreate
		}
		before, v.Ends = g.seq, g.kind == nucleus.KindPodEnd
	}
	return nil
}

func verifyProof(raw []byte, o VerifyReceiptOptions) (*Receipt, error) {
	if len(raw) > maxProof {
		return nil, refuse(TooLarge, "%d bytes, a proof has at most %d", len(raw), maxProof)
	}
	entry, index, path, signed, err := parseProof(raw)
	if err != nil {
		return nil, err
	}
	v, err := believe(signed, o)
	if err != nil {
		return nil, err
	}
	root, err := tlog.ParseHash(v.Root)
	if err != nil {
		return nil, err
	}
	if index >= v.Size {
		return nil, refuse(Extra, "entry %d is beyond the checkpoint of %d entries", index, v.Size)
	}
	if err := tlog.CheckRecord(path, v.Size, root, index, tlog.RecordHash(entry)); err != nil {
		return nil, refuse(Changed, "entry %d and the hashes do not lead to the checkpoint's root: %v", index, err)
	}
	if g, err := look(entry); err != nil || g.seq != index {
		return nil, refuse(Changed, "the entry at %d is numbered %d", index, g.seq)
	}
	_, err = v.read([]int64{index}, [][]byte{entry})
	return v, err
}

// believe checks the signatures under a checkpoint.
func believe(signed []byte, o VerifyReceiptOptions) (*Receipt, error) {
	key, err := note.NewVerifier(strings.TrimSpace(o.Key))
	if err != nil {
		return nil, fmt.Errorf("verifier key %q: %w", o.Key, err)
	}
	cp, err := openCheckpoint(signed, key)
	switch {
	case errors.Is(err, errSignature):
		return nil, refuse(BadSignature, "the checkpoint: %v", err)
	case err != nil:
		return nil, malformed("the checkpoint: %v", err)
	}
	v := &Receipt{
		Origin: cp.Origin, Size: cp.Size, Root: cp.Root.String(), Checkpoint: string(signed),
		Open: []int64{}, Witnesses: []Witnessed{}, Others: []string{}, Entries: []json.RawMessage{},
	}
	for _, key := range o.Witnesses {
		w, err := cosigned(signed, key)
		if err != nil {
			return nil, err
		}
		v.Witnesses = append(v.Witnesses, w)
	}
	v.Others = others(signed, v)
	return v, nil
}

// others are the names in signature lines that nobody has checked.
func others(signed []byte, v *Receipt) []string {
	names := []string{}
	for line := range strings.Lines(string(signed[bytes.LastIndex(signed, []byte("\n\n"))+2:])) {
		name, _, _ := strings.Cut(strings.TrimPrefix(line, "— "), " ")
		if name != v.Origin && !slices.ContainsFunc(v.Witnesses, func(w Witnessed) bool { return w.Name == name }) {
			names = append(names, name)
		}
	}
	return names
}

// read takes in what the entries say, which are proved, and checks what can be checked
// of it. orphans are outcomes whose intents are not shown before them.
func (v *Receipt) read(indexes []int64, raw [][]byte) (orphans []int64, err error) {
	v.First, v.Last = indexes[0], indexes[len(indexes)-1]
	v.Between = v.Last - v.First + 1 - int64(len(indexes))
	keys, open := map[string][]byte{}, map[string]int64{}
	for i, raw := range raw {
		e, err := decode(raw)
		if err != nil {
			return nil, malformed("entry %d: %v", indexes[i], err)
		}
		if v.Session != "" && e.Session != v.Session {
			return nil, refuse(Foreign, "entry %d is of session %q, the receipt of %q", e.Seq, e.Session, v.Session)
		}
		switch {
		case e.Kind == nucleus.KindPodStart:
			var start struct {
				Boot string `json:"boot"`
				Key  []byte `json:"outcome_key"`
			}
			if json.Unmarshal(e.Data, &start) == nil && start.Boot != "" {
				keys[start.Boot] = start.Key
			}
		case e.Kind == nucleus.KindIntent && e.Permit != "":
			open[e.Permit] = e.Seq
		case e.Kind == nucleus.KindOutcome:
			if _, known := open[e.Permit]; !known {
				orphans = append(orphans, e.Seq)
			}
			delete(open, e.Permit)
			if err := v.checkOutcome(e, keys); err != nil {
				return nil, err
			}
		}
		v.Entries = append(v.Entries, raw)
	}
	v.Open = append(v.Open, slices.Sorted(maps.Values(open))...)
	return orphans, nil
}

// checkOutcome checks the machine's signature over an outcome, or over its admission of
// what the node did on the host, and that the entry's status is what was signed. What the node
// signed itself, nobody can check here: its entry stands under the log's key alone.
func (v *Receipt) checkOutcome(e nucleus.Entry, keys map[string][]byte) error {
	if e.Outcome == nil {
		if e.Status == nucleus.OutcomeDone || e.Status == nucleus.OutcomeFailed {
			v.Unchecked++ // the node's word alone
		}
		return nil
	}
	says, err := statement(e.Outcome)
	if err != nil {
		return refuse(BadOutcome, "entry %d: %v", e.Seq, err)
	}
	if says.Status != e.Status && e.Status != nucleus.OutcomeUnknown {
		return refuse(BadOutcome, "entry %d has the status %q, what was signed says %q", e.Seq, e.Status, says.Status)
	}
	proof, want := e.Outcome, says.Status
	if e.Op.OnHost() {
		if proof = says.Admission; proof == nil {
			if e.Status == nucleus.OutcomeDone || e.Status == nucleus.OutcomeFailed {
				return refuse(BadOutcome, "entry %d has the status %q, and the machine did not admit it", e.Seq, e.Status)
			}
			return nil
		}
		if want = nucleus.OutcomeAdmitted; e.Status == nucleus.OutcomeRefused {
			want = "" // by whom, the machine or the node after it, says the statement
		}
	}
	key, ok := keys[says.Boot]
	if !ok {
		v.Unchecked++
		return nil
	}
	var payload json.RawMessage // which may say more than this program knows
	err = proof.Open(key, nucleus.DomainOutcome, &payload)
	signed := nucleus.Outcome{}
	if err == nil {
		err = json.Unmarshal(payload, &signed)
	}
	switch {
	case err != nil:
		return refuse(BadOutcome, "entry %d: what the machine is to have signed: %v", e.Seq, err)
	case signed.Permit != e.Permit || signed.Pod != e.Pod:
		return refuse(BadOutcome, "entry %d is of permit %s, the machine signed for %s", e.Seq, e.Permit, signed.Permit)
	case want != "" && signed.Status != want:
		return refuse(BadOutcome, "entry %d has the status %q, and the machine signed %q", e.Seq, e.Status, signed.Status)
	}
	v.Signed++
	return nil
}

// statement is what a signed outcome says, unchecked.
func statement(s *nucleus.Signed) (says nucleus.Outcome, err error) {
	return says, json.Unmarshal(s.Payload, &says)
}

// Says is what a receipt proves, in sentences of printable ASCII for a person.
func (v *Receipt) Says() []string {
	says := v.proves()
	for i := range says {
		says[i] = Printable(says[i])
	}
	return says
}

func (v *Receipt) proves() []string {
	says := []string{fmt.Sprintf("%s: %d of the %d entries under the checkpoint, each in the log at its place", v.Origin, len(v.Entries), v.Size)}
	if v.Session == "" {
		return says
	}
	says = append(says, fmt.Sprintf("%d outcomes have the machine's signature, %d are on the node's word alone", v.Signed, v.Unchecked))
	says = append(says, fmt.Sprintf("session %s, from entry %d to entry %d", v.Session, v.First, v.Last))
	if v.Begins && v.Linked {
		end := fmt.Sprintf("what came after entry %d, it does not prove", v.Last)
		if v.Ends {
			end = "the last one ends it"
		}
		return append(says, "the first entry begins the session, and each other one names the one before it: none is left out; "+end, v.openIntents())
	}
	between := "no entry of the log lies between them that is not shown"
	switch {
	case v.Between == 1:
		between = "1 entry of the log lies between them and is not shown: whose it is, this receipt does not prove"
	case v.Between > 1:
		between = fmt.Sprintf("%d entries of the log lie between them and are not shown: whose they are, this receipt does not prove", v.Between)
	}
	return append(says, between, "it does not prove that the session had no other entry before the first or after the last", v.openIntents())
}

// openIntents says which intents have no outcome; of many, the first.
func (v *Receipt) openIntents() string {
	const most = 20
	list := []string{}
	for _, seq := range v.Open[:min(len(v.Open), most)] {
		list = append(list, strconv.FormatInt(seq, 10))
	}
	if n := len(v.Open) - most; n > 0 {
		list = append(list, fmt.Sprintf("%d more", n))
	}
	switch len(v.Open) {
	case 0:
		return "each intent that had a permit has its outcome"
	case 1:
		return "the intent in entry " + list[0] + " has no outcome: what came of it, this receipt does not prove"
	}
	return "the intents in entries " + strings.Join(list, ", ") + " have no outcome: what came of them, this receipt does not prove"
}
