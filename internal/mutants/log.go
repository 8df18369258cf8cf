package main

// logMutants break the log and its witnesses.
var logMutants = []mutant{
	// writing
	{"log: nobody is told before the sync", "audit/log.go", "if err := l.journal.Sync(); err != nil {", "if err := error(nil); err != nil {", "TestEveryOperationFails"},
	{"log: what could not be written refuses the rest", "audit/log.go", "	if err := l.failure(); err != nil {\n		return err\n	}\n	var bundle []byte", "	var bundle []byte", "TestQueuedBehindAFailure"},
	{"log: a torn write is marked", "audit/recover.go", "if len(j.tail) > 0 {", "if false {", "TestTornAtEveryByte"},
	{"log: damage is no torn write", "audit/journal.go", "if _, ok := unframe(j.tail[i:]); ok {", "if false {", "TestDamagedJournalIsRefused"},
	{"log: a record fits its checkpoint", "audit/recover.go", "if s.tree.root() != r.says.Root {", "if false {", "TestForgedRecord"},
	// verifying
	{"log: a root is the one that was signed", "audit/verify.go", "if root := s.tree.root(); root != claim.root {", "if root := s.tree.root(); false {", "TestEveryEntryOf50"},
	{"log: a tile fits its entries", "audit/verify.go", "if !slices.Equal(entries, tile) {", "if false {", "TestEveryByteOf50Entries"},
	{"log: a signature has one spelling", "audit/checkpoint.go", "if _, err := base64.StdEncoding.Strict().DecodeString(sig.Base64); err != nil {", "if false {", "TestEveryByteOf50Entries"},
	{"log: the open intents are those of the entries", "audit/verify.go", "if open := c.openNow(); !slices.Equal(open, c.journal.open)", "if open := c.openNow(); false", "TestForgedOpenIntents"},
	{"log: entries count up", "audit/verify.go", "if g.seq != index+c.shift {", "if false {", "TestRewriteByTheKeyHolder"},
	{"log: a kept checkpoint shows a fork", "audit/verify.go", "claims(*c.kept, Fork,", "claims(Checkpoint{}, Fork,", "TestRewriteByTheKeyHolder"},
	{"log: a kept checkpoint shows a cut", "audit/verify.go", "if c.kept != nil && c.kept.Size > size {", "if false {", "TestTruncation"},
	{"log: files that no tree has", "audit/verify.go", "		c.stray(name, size)", "		_ = name", "TestVerifyFindsStrayFiles"},
	// witnesses
	{"log: what was cosigned binds who opens", "audit/recover.go", "if err := l.checkCosigned(j, s); err != nil {", "if err := error(nil); err != nil {", "TestKeep"},
	{"log: what was cosigned binds who verifies", "audit/verify.go", "claims(*c.cosigned, Fork,", "claims(Checkpoint{}, Fork,", "TestKeep"},
	{"log: a cosignature is checked", "audit/cosignature.go", "|| !ed25519.Verify(public, cosignedText(body, int64(unix)), raw[12:])", "|| len(body) == 0", "TestCosignaturesRefuse"},
	{"log: the witness checks consistency", "audit/witness/witness.go", "if err := tlog.CheckTree(proof, next.Size, next.Root, last.Size, last.Root); err != nil {", "if false {", "TestRefusals"},
	{"log: one root for one size", "audit/witness/witness.go", "		if next.Root != last.Root {", "		if false {", "TestRefusals"},
	{"log: an old size is the one that was kept", "audit/witness/witness.go", "if r.old != last.Size {", "if false {", "TestRefusals"},
	{"log: what is not kept is not cosigned", "audit/witness/witness.go", "if err := w.Store.Keep(origin, cosigned); err != nil {", "if err := w.Store.Keep(origin, cosigned); false {", "TestNotKept"},
	{"log: an answer is the witness's", "audit/witness/client.go", "if _, err := audit.AddCosignature(signed, line, c.Key); err == nil {", "if true {", "TestClient"},
	{"log: a witness that is ahead", "audit/witness/client.go", "if int64(stale) > cp.Size {", "if false {", "TestClient"},
	{"log: the authority sees the log before an ask", "node/approve.go", "if _, _, err := n.witness.show(ctx); err != nil {", "if err := error(nil); err != nil {", "TestAskIsWitnessed"},
	{"log: no effect without a required witness", "node/node.go", "if err := n.witness.allow(); err != nil {", "if err := error(nil); err != nil {", "TestRequiredWitness"},
	{"log: no patience with a witness that contradicts", "node/witness.go", "		w.last = time.Time{} // it contradicts: no patience", "", "TestRequiredWitness"},
	// redaction
	{"log: what looks random is not shown", "audit/random.go", "looksRandom(text[at:end]) &&", "false &&", "TestShownHidesSecrets"},
	{"log: digests and public keys are shown", "audit/random.go", "&& !isPublic(text, at, end)", "", "TestShownKeepsTheRest"},
	{"log: names in camel case are shown", "audit/random.go", "float64(changes) < least*float64(pairs)", "least < 0", "TestShownKeepsTheRest"},
	{"log: a header is hidden whole", "audit/shown.go", "		text = redactHeaders(text)", "", "TestShownByName"},
	{"log: a basic credential is one", "audit/shown.go", "if err != nil || !strings.Contains(string(pair), \":\") {", "if false && err != nil && pair == nil {", "TestShownKeepsTheRest"},

	{"receipt: entries and hashes lead to the root", "audit/receipt_verify.go", "case root.String() != v.Root:", "case false:", "TestReceiptRefuses"},
	{"receipt: neither more hashes nor fewer", "audit/receipt_verify.go", "case !ok && len(r.hashes) < need:", "case false:", "TestReceiptRefuses"},
	{"receipt: entries are of its session", "audit/receipt_verify.go", "e.Session != v.Session {", "false {", "TestReceiptRefuses"},
	{"receipt: entries rise", "audit/receipt.go", "g.seq <= r.indexes[n-1] {", "false {", "TestReceiptRefuses"},
	{"receipt: a header has one spelling", "audit/receipt.go", "if again != text ||", "if again == \"\" ||", "TestReceiptRefuses"},
	{"receipt: nothing behind the body", "audit/receipt.go", "if in.Len() > 0 {", "if false {", "TestReceiptRefuses"},
	{"receipt: every bit of it counts", "audit/receipt.go", "hex.EncodeToString(sum[:]) != h.sum", "hex.EncodeToString(sum[:]) == \"\"", "TestReceiptEveryBit"},
	{"receipt: what is unpacked is bounded", "audit/receipt.go", "if len(body) > maxBody {", "if false {", "TestReceiptIsBounded"},
	{"receipt: the machine signed this permit's outcome", "audit/receipt_verify.go", "signed.Permit != e.Permit || signed.Pod != e.Pod", "signed.Permit == \"\"", "TestReceiptOutcomes"},
	{"receipt: the cosigned checkpoint covers it", "audit/view.go", "last < cp.Size && cp.Size <= w.Size", "cp.Size <= w.Size", "TestReceiptCosigned"},
	{"receipt: a grant that was used was given", "audit/compare.go", "!ok || ask != e.Ask {", "!ok && ask != e.Ask {", "TestCompare"},
	{"log: a filter looks at the member it names", "audit/find.go", "return hasMembers(raw, members) &&", "return", "TestFind"},
}
