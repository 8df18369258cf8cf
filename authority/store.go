package authority

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"

	"modernc.org/sqlite" // and the driver "sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"cal/approval/client"
	"cal/audit/witness"
	"cal/nucleus"
)

// store keeps asks, decisions and records in one SQLite file. Every change is
// durable when its method returns.
type store struct {
	db *sql.DB
	id string // made with the database: another one knows nothing of what this one took back
}

var errUnknown = errors.New("unknown")

const schema = `
CREATE TABLE IF NOT EXISTS pods (
	pod TEXT PRIMARY KEY,
	keys TEXT NOT NULL -- a client.Pod
) STRICT;
CREATE TABLE IF NOT EXISTS asks (
	id TEXT PRIMARY KEY,
	sha256 TEXT NOT NULL,
	canonical BLOB NOT NULL,
	request_sha256 TEXT NOT NULL UNIQUE,
	pod TEXT NOT NULL,
	op TEXT NOT NULL,
	summary TEXT NOT NULL,
	need INTEGER NOT NULL,
	created_ms INTEGER NOT NULL,
	expires_ms INTEGER NOT NULL,
	state TEXT NOT NULL CHECK (state IN ('pending', 'granted', 'denied', 'withdrawn', 'revoked')),
	reason TEXT NOT NULL DEFAULT '',
	decided_ms INTEGER NOT NULL DEFAULT 0,
	about TEXT NOT NULL DEFAULT '' -- an about
) STRICT;
CREATE INDEX IF NOT EXISTS asks_by_state ON asks (state, expires_ms);
CREATE INDEX IF NOT EXISTS asks_by_age ON asks (created_ms, id);
CREATE TABLE IF NOT EXISTS grants (
	jti TEXT PRIMARY KEY,
	ask TEXT NOT NULL,
	approver TEXT NOT NULL,
	reason TEXT NOT NULL,
	token TEXT NOT NULL,
	given_ms INTEGER NOT NULL,
	UNIQUE (ask, approver)
) STRICT;
CREATE TABLE IF NOT EXISTS dropped (
	jti TEXT PRIMARY KEY -- a grant that was taken back before all had granted
) STRICT;
CREATE TABLE IF NOT EXISTS uses (
	ask TEXT NOT NULL,
	n INTEGER NOT NULL,
	permit TEXT NOT NULL,
	used_ms INTEGER NOT NULL,
	outcome TEXT NOT NULL DEFAULT '',
	PRIMARY KEY (ask, n)
) STRICT;
CREATE TABLE IF NOT EXISTS removed (
	approver TEXT PRIMARY KEY,
	removed_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS passkeys (
	approver TEXT PRIMARY KEY,
	counter INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS revocations (
	seq INTEGER PRIMARY KEY AUTOINCREMENT,
	ask TEXT NOT NULL UNIQUE
) STRICT;
CREATE TABLE IF NOT EXISTS self (
	id TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS owed (
	seq INTEGER PRIMARY KEY,
	entry TEXT NOT NULL -- what holds already and the log does not say yet
) STRICT;
CREATE TABLE IF NOT EXISTS watchers (
	id TEXT PRIMARY KEY
) STRICT;
CREATE TABLE IF NOT EXISTS logs (
	origin TEXT PRIMARY KEY,
	key TEXT NOT NULL,
	checkpoint BLOB
) STRICT;
CREATE TABLE IF NOT EXISTS record (
	seq INTEGER PRIMARY KEY,
	entry TEXT NOT NULL
) STRICT;`

// migrate brings a database of the time when there was one approver, whose name is given, to
// the present form. What was not decided or used then has bytes that say less than is signed
// today, so it is void.
const migrate = `
DROP INDEX IF EXISTS asks_state;
ALTER TABLE asks RENAME TO old_asks;` + schema + `
INSERT INTO asks SELECT id, sha256, canonical, request_sha256, pod, op, summary, 1, created_ms, expires_ms,
	CASE WHEN state = 'pending' THEN 'withdrawn' WHEN state = 'granted' AND used_ms = 0 THEN 'revoked' ELSE state END, reason, 0, '' FROM old_asks;
INSERT INTO grants SELECT jti, id, @approver, reason, token, created_ms FROM old_asks WHERE jti IS NOT NULL;
INSERT INTO uses SELECT id, 1, '', used_ms, '' FROM old_asks WHERE used_ms != 0;
DROP TABLE old_asks;`

const schemaVersion = 1

// openStore opens the database. approver is the first one, who signed all that an older
// database holds.
func openStore(path, approver string) (*store, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return nil, err
	}
	dsn := url.URL{Scheme: "file", OmitHost: true, Path: path, RawQuery: "_pragma=auto_vacuum(INCREMENTAL)&_txlock=immediate&_pragma=busy_timeout(5000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=journal_size_limit(1048576)"}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	db.SetMaxOpenConns(1)
	var check string
	err = db.QueryRow("PRAGMA quick_check(1)").Scan(&check)
	if err == nil && check != "ok" {
		err = errors.New(check)
	}
	if err == nil {
		err = prepare(db, approver)
	}
	if err != nil {
		if code := codeOf(err); check != "" && check != "ok" || code == sqlite3.SQLITE_NOTADB || code == sqlite3.SQLITE_CORRUPT {
			err = fmt.Errorf("%w: it is damaged; move it away (mkdir damaged && mv %s* damaged/, in %s) and start anew: the keys, and the log of what was decided, are files of their own and stay; what was asked and not answered, and what was granted and not used, is void", err, filepath.Base(path), filepath.Dir(path))
		}
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), db.Close())
	}
	s := &store{db: db}
	if s.id, err = s.name(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), db.Close())
	}
	if err := s.shrinkable(); err != nil { // it works as it is, and only keeps the room that it has taken
		slog.Warn("the authority's database cannot be made one that shrinks", "file", path, "error", err)
	}
	return s, nil
}

// name is the database's id, which is made once.
func (s *store) name() (id string, err error) {
	if _, err := s.db.Exec("INSERT INTO self SELECT ? WHERE NOT EXISTS (SELECT 1 FROM self)", nucleus.NewID("db-")); err != nil {
		return "", err
	}
	return id, s.db.QueryRow("SELECT id FROM self").Scan(&id)
}

// shrinkable makes a database of an earlier version one that can give room back.
func (s *store) shrinkable() error {
	var mode int
	if err := s.db.QueryRow("PRAGMA auto_vacuum").Scan(&mode); err != nil || mode == 2 {
		return err
	}
	_, err := s.db.Exec("PRAGMA auto_vacuum = INCREMENTAL; VACUUM")
	return err
}

// codeOf is SQLite's primary code of an error; 0 for one that is not SQLite's.
func codeOf(err error) int {
	var of *sqlite.Error
	if errors.As(err, &of) {
		return of.Code() & 0xff
	}
	return 0
}

func prepare(db *sql.DB, approver string) error {
	tx, err := db.Begin()
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // after Commit it does nothing
	var version, tables int
	if err := tx.QueryRow("PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	if err := tx.QueryRow("SELECT COUNT(*) FROM sqlite_schema WHERE type = 'table' AND name = 'asks'").Scan(&tables); err != nil {
		return err
	}
	switch {
	case version == schemaVersion:
		if _, err = tx.Exec(schema); err == nil { // tables that came later
			err = addAbout(tx)
		}
	case version > schemaVersion:
		return fmt.Errorf("its format is %d, this program knows %d: it was written by a newer one", version, schemaVersion)
	case tables == 0:
		_, err = tx.Exec(schema)
	default:
		_, err = tx.Exec(migrate, sql.Named("approver", approver))
	}
	if err == nil {
		_, err = tx.Exec(fmt.Sprintf("PRAGMA user_version = %d", schemaVersion))
	}
	if err != nil {
		return err
	}
	return tx.Commit()
}

func (s *store) close() error { return s.db.Close() }

// Record implements Recorder.
func (s *store) Record(entry nucleus.Entry) error {
	raw, err := nucleus.Canonical(entry)
	if err != nil {
		return err
	}
	_, err = s.db.Exec("INSERT INTO record (entry) VALUES (?)", string(raw))
	return err
}

// HasUse implements Recorder.
func (s *store) HasUse(permit string) (found bool, err error) {
	err = s.db.QueryRow("SELECT EXISTS (SELECT 1 FROM record WHERE json_extract(entry, '$.kind') = ? AND json_extract(entry, '$.permit') = ?)", nucleus.KindApprovalUse, permit).Scan(&found)
	return found, err
}

// lastUse is the use that was counted last, whatever the clock said then, and the ask that it is of; "" for none. Those
// of a database of the time before permits were kept are not looked at.
func (s *store) lastUse() (ask string, use client.UseOf, err error) {
	err = s.db.QueryRow("SELECT ask, n, permit FROM uses WHERE permit != '' ORDER BY rowid DESC LIMIT 1").Scan(&ask, &use.N, &use.Permit)
	if errors.Is(err, sql.ErrNoRows) {
		return "", use, nil
	}
	return ask, use, err
}

// addRemoved writes down what an approver's file says of a removal; the first word counts.
func (s *store) addRemoved(approver string, at int64) error {
	_, err := s.db.Exec("INSERT INTO removed VALUES (?, ?) ON CONFLICT DO NOTHING", approver, at)
	return err
}

// removedAt is when an approver was removed; 0: it was not.
func (s *store) removedAt(approver string) (at int64, err error) {
	return at, s.db.QueryRow("SELECT COALESCE(MAX(removed_ms), 0) FROM removed WHERE approver = ?", approver).Scan(&at)
}

// addPod keeps what is said of a pod unless something is known, and returns what is.
func (s *store) addPod(pod, said string) (string, error) {
	if _, err := s.db.Exec("INSERT INTO pods VALUES (?, ?) ON CONFLICT DO NOTHING", pod, said); err != nil {
		return "", err
	}
	return s.pod(pod)
}

func (s *store) pod(pod string) (said string, err error) {
	err = s.db.QueryRow("SELECT keys FROM pods WHERE pod = ?", pod).Scan(&said)
	if errors.Is(err, sql.ErrNoRows) {
		return "", errUnknown
	}
	return said, err
}

// addAsk keeps an ask with its bytes, of which request is the digest of what the requester signed.
func (s *store) addAsk(r askRow, request string, canonical []byte) error {
	about, err := nucleus.Canonical(r.about)
	if err != nil {
		return err
	}
	_, err = s.db.Exec("INSERT INTO asks (id, sha256, canonical, request_sha256, pod, op, summary, need, created_ms, expires_ms, state, about) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
		r.id, r.digest, canonical, request, r.pod, string(r.op), r.summary, r.need, r.created, r.expires, r.state, string(about))
	return err
}

// canonical is what an ask says, which is long: no row carries it.
func (s *store) canonical(id string) (raw []byte, err error) {
	return raw, s.db.QueryRow("SELECT canonical FROM asks WHERE id = ?", id).Scan(&raw)
}

// end writes what became of an ask that was in a state before.
func (s *store) end(id, before, after, reason string, now int64) error {
	result, err := s.db.Exec("UPDATE asks SET state = ?, reason = ?, decided_ms = ? WHERE id = ? AND state = ?", after, reason, now, id, before)
	return exactlyOne(result, err)
}

// addGrant adds an approver's grant to a pending ask, and makes the ask granted when that was
// the last one needed.
func (s *store) addGrant(r askRow, g client.Given) error {
	tx, err := s.db.Begin()
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // after Commit it does nothing
	if _, err := tx.Exec("INSERT INTO grants VALUES (?, ?, ?, ?, ?, ?)", g.Grant, r.id, g.Approver, g.Reason, g.Token, g.Given); err != nil {
		return err
	}
	result, err := tx.Exec(`UPDATE asks SET decided_ms = ?, state = CASE WHEN (SELECT COUNT(*) FROM grants WHERE ask = id) >= need THEN 'granted' ELSE 'pending' END
		WHERE id = ? AND state = 'pending'`, g.Given, r.id)
	if err := exactlyOne(result, err); err != nil {
		return err
	}
	return tx.Commit()
}

// dropGrant takes a grant from an ask that is pending, for good.
func dropGrant(tx *sql.Tx, id string) error {
	result, err := tx.Exec("DELETE FROM grants WHERE jti = ? AND (SELECT state FROM asks WHERE id = ask) = 'pending'", id)
	if err := exactlyOne(result, err); err != nil {
		return err
	}
	_, err = tx.Exec("INSERT INTO dropped VALUES (?)", id)
	return err
}

// knowsGrant reports whether a grant was kept before.
func (s *store) knowsGrant(id string) (known bool, err error) {
	return known, s.db.QueryRow("SELECT EXISTS (SELECT 1 FROM grants WHERE jti = ?) OR EXISTS (SELECT 1 FROM dropped WHERE jti = ?)", id, id).Scan(&known)
}

// addUse counts use n of what was granted for an ask; two of one number are an error.
func (s *store) addUse(ask string, n int, permit string, now int64) error {
	_, err := s.db.Exec("INSERT INTO uses (ask, n, permit, used_ms) VALUES (?, ?, ?, ?)", ask, n, permit, now)
	return err
}

// dropUse takes back the counting of a use.
func (s *store) dropUse(ask string, n int, permit string) error {
	_, err := s.db.Exec("DELETE FROM uses WHERE ask = ? AND n = ? AND permit = ?", ask, n, permit)
	return err
}

func exactlyOne(result sql.Result, err error) error {
	if err != nil {
		return err
	}
	n, err := result.RowsAffected()
	if err == nil && n != 1 {
		err = fmt.Errorf("%d rows changed, want 1", n)
	}
	return err
}

const askColumns = `SELECT id, sha256, LENGTH(canonical), about, pod, op, summary, need, created_ms, expires_ms, state, reason, decided_ms,
	(SELECT COUNT(*) FROM uses WHERE ask = id) FROM asks`

func (s *store) ask(id string) (askRow, error) {
	rows, err := s.asks(" WHERE id = ?", id)
	if err == nil && len(rows) == 0 {
		err = errUnknown
	}
	if err != nil {
		return askRow{}, err
	}
	return rows[0], nil
}

// granted returns the asks that somebody has granted, oldest first, of a pod or of all.
func (s *store) granted(pod string) ([]askRow, error) {
	return s.asks(" WHERE (pod = ? OR ? = '') AND EXISTS (SELECT 1 FROM grants WHERE ask = id) ORDER BY created_ms, id", pod, pod)
}

// grantedBy returns the asks that an approver has granted, that are not over otherwise and that
// expire after a time.
func (s *store) grantedBy(approver string, since int64) ([]askRow, error) {
	return s.asks(" WHERE state IN ('pending', 'granted') AND expires_ms > ? AND EXISTS (SELECT 1 FROM grants WHERE ask = id AND approver = ?) ORDER BY created_ms, id", since, approver)
}

// newest returns some of the asks that somebody has granted and that expired after a time, newest
// first, of a pod or of all.
func (s *store) newest(pod string, since int64, skip int) ([]askRow, error) {
	return s.asks(" WHERE (pod = ? OR ? = '') AND expires_ms > ? AND EXISTS (SELECT 1 FROM grants WHERE ask = id) ORDER BY created_ms DESC, id DESC LIMIT ? OFFSET ?", pod, pod, since, approvalsAtOnce, skip)
}

// asks returns the asks that a condition, written in this package, chooses, with their grants.
func (s *store) asks(where string, args ...any) (list []askRow, err error) {
	rows, err := s.db.Query(askColumns+where, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var r askRow
		var about string
		if err := rows.Scan(&r.id, &r.digest, &r.length, &about, &r.pod, &r.op, &r.summary, &r.need, &r.created, &r.expires, &r.state, &r.reason, &r.ended, &r.uses); err != nil {
			return nil, err
		}
		r.about = readAbout(about, r.op)
		list = append(list, r)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	for i := range list {
		if list[i].grants, err = s.grantsOf(list[i].id); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func (s *store) grantsOf(ask string) (list []client.Given, err error) {
	rows, err := s.db.Query("SELECT jti, approver, reason, given_ms, token FROM grants WHERE ask = ? ORDER BY given_ms, rowid", ask)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var g client.Given
		if err := rows.Scan(&g.Grant, &g.Approver, &g.Reason, &g.Given, &g.Token); err != nil {
			return nil, err
		}
		list = append(list, g)
	}
	return list, rows.Err()
}

// usesOf lists the uses of what was granted for an ask.
func (s *store) usesOf(ask string) (list []client.UseOf, err error) {
	rows, err := s.db.Query("SELECT n, permit, used_ms, outcome FROM uses WHERE ask = ? ORDER BY n", ask)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	list = []client.UseOf{}
	for rows.Next() {
		var u client.UseOf
		if err := rows.Scan(&u.N, &u.Permit, &u.Used, &u.Outcome); err != nil {
			return nil, err
		}
		if u.Outcome == "" {
			u.Outcome = nucleus.OutcomeUnknown
		}
		list = append(list, u)
	}
	return list, rows.Err()
}

// setOutcome writes down what came of a use that nothing was said of before.
func (s *store) setOutcome(ask, permit, outcome string) error {
	result, err := s.db.Exec("UPDATE uses SET outcome = ? WHERE ask = ? AND permit = ? AND outcome = ''", outcome, ask, permit)
	return exactlyOne(result, err)
}

// askOf is the ask that a grant was given for.
func (s *store) askOf(grant string) (id string, err error) {
	err = s.db.QueryRow("SELECT ask FROM grants WHERE jti = ?", grant).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		err = errUnknown
	}
	return id, err
}

// void makes grants for an ask void, with the entry that the log is owed. What all had granted is
// put where watchers see it; an ask that waits for more goes on without.
func (s *store) void(v void, owed nucleus.Entry) error {
	return s.owing(owed, func(tx *sql.Tx) error {
		if v.row.state == client.Pending {
			for _, grant := range v.grants {
				if err := dropGrant(tx, grant); err != nil {
					return err
				}
			}
			return nil
		}
		result, err := tx.Exec("UPDATE asks SET state = 'revoked', reason = ?, decided_ms = ? WHERE id = ? AND state = 'granted'", v.why, v.at, v.row.id)
		if err := exactlyOne(result, err); err != nil {
			return err
		}
		_, err = tx.Exec("INSERT INTO revocations (ask) VALUES (?)", v.row.id)
		return err
	})
}

// withdraw ends an ask for which nobody waits any more.
func (s *store) withdraw(id, reason string, now int64, owed nucleus.Entry) error {
	return s.owing(owed, func(tx *sql.Tx) error {
		result, err := tx.Exec("UPDATE asks SET state = 'withdrawn', reason = ?, decided_ms = ? WHERE id = ? AND state = 'pending'", reason, now, id)
		return exactlyOne(result, err)
	})
}

// remove writes down that an approver was removed; the first word counts.
func (s *store) remove(approver string, at int64, owed nucleus.Entry) error {
	if known, err := s.removedAt(approver); known != 0 || err != nil {
		return err
	}
	return s.owing(owed, func(tx *sql.Tx) error {
		_, err := tx.Exec("INSERT INTO removed VALUES (?, ?)", approver, at)
		return err
	})
}

// owing makes a change together with the entry that the log is owed for it.
func (s *store) owing(entry nucleus.Entry, change func(*sql.Tx) error) error {
	raw, err := nucleus.Canonical(entry)
	if err != nil {
		return err
	}
	tx, err := s.db.Begin()
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // after Commit it does nothing
	if err := change(tx); err != nil {
		return err
	}
	if _, err := tx.Exec("INSERT INTO owed (entry) VALUES (?)", string(raw)); err != nil {
		return err
	}
	return tx.Commit()
}

// owed is the first entry that the log is owed; paid forgets it.
func (s *store) owed() (seq int64, entry nucleus.Entry, err error) {
	var raw string
	err = s.db.QueryRow("SELECT seq, entry FROM owed ORDER BY seq LIMIT 1").Scan(&seq, &raw)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, entry, errUnknown
	} else if err != nil {
		return 0, entry, err
	}
	return seq, entry, json.Unmarshal([]byte(raw), &entry)
}

func (s *store) paid(seq int64) error {
	_, err := s.db.Exec("DELETE FROM owed WHERE seq = ?", seq)
	return err
}

// addWatcher writes down that a node watches, and dropWatcher that it is known not to any more.
func (s *store) addWatcher(id string) error {
	_, err := s.db.Exec("INSERT INTO watchers VALUES (?) ON CONFLICT DO NOTHING", id)
	return err
}

func (s *store) dropWatcher(id string) error {
	_, err := s.db.Exec("DELETE FROM watchers WHERE id = ?", id)
	return err
}

func (s *store) watchers() (ids []string, err error) {
	rows, err := s.db.Query("SELECT id FROM watchers")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, rows.Err()
}

// revocations returns what was taken back after a number, and the last number.
func (s *store) revocations(after int64) (asks []string, last int64, err error) {
	if err := s.db.QueryRow("SELECT COALESCE(MAX(seq), 0) FROM revocations").Scan(&last); err != nil || after < 0 {
		return nil, last, err
	}
	rows, err := s.db.Query("SELECT ask FROM revocations WHERE seq > ? AND seq <= ? ORDER BY seq", after, last)
	if err != nil {
		return nil, 0, err
	}
	defer rows.Close()
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, 0, err
		}
		asks = append(asks, id)
	}
	return asks, last, rows.Err()
}

func (s *store) askOfRequest(digest string) (id string, err error) {
	err = s.db.QueryRow("SELECT id FROM asks WHERE request_sha256 = ?", digest).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		err = errUnknown
	}
	return id, err
}

// shed forgets the bytes of an ask that has ended: what it was, who decided and what came of it
// stay.
func (s *store) shed(id string) error {
	result, err := s.db.Exec("UPDATE asks SET canonical = x'' WHERE id = ?", id)
	return exactlyOne(result, err)
}

// kept is how many bytes of asks the database holds.
func (s *store) kept() (bytes int64, err error) {
	return bytes, s.db.QueryRow("SELECT COALESCE(SUM(LENGTH(canonical)), 0) FROM asks").Scan(&bytes)
}

// sheddable are some of the asks with bytes that nobody can answer any more: those that were used
// last, so that a flood of others does not take their bytes, and the oldest first.
func (s *store) sheddable(now int64, skip int) ([]askRow, error) {
	return s.asks(" WHERE LENGTH(canonical) > 0 AND expires_ms <= ? OR LENGTH(canonical) > 0 AND state IN ('denied', 'withdrawn', 'revoked') ORDER BY EXISTS (SELECT 1 FROM uses WHERE ask = id), created_ms, id LIMIT ? OFFSET ?", now, shedAtOnce, skip)
}

// shrink gives the room of what was forgotten back to the file system.
func (s *store) shrink() error {
	for _, pragma := range []string{"PRAGMA incremental_vacuum", "PRAGMA wal_checkpoint(TRUNCATE)"} {
		rows, err := s.db.Query(pragma)
		if err != nil {
			return err
		}
		for rows.Next() { // it works row by row
		}
		if err := errors.Join(rows.Err(), rows.Close()); err != nil {
			return err
		}
	}
	return nil
}

// load is how many asks wait, and how many canonical bytes they have.
type load struct{ asks, bytes int }

// pending is what waits of all, and of a pod.
func (s *store) pending(pod string, now int64) (all, own load, err error) {
	err = s.db.QueryRow(`SELECT COUNT(*), COALESCE(SUM(LENGTH(canonical)), 0), COUNT(*) FILTER (WHERE pod = @pod), COALESCE(SUM(LENGTH(canonical)) FILTER (WHERE pod = @pod), 0)
		FROM asks WHERE state = 'pending' AND expires_ms > @now`, sql.Named("pod", pod), sql.Named("now", now)).Scan(&all.asks, &all.bytes, &own.asks, &own.bytes)
	return all, own, err
}

// list returns the newest of the asks in a state at a time, oldest first; empty for all.
func (s *store) list(state string, most int, now int64) (items []client.Item, err error) {
	where, args := "", []any{}
	switch state {
	case "":
	case client.Pending:
		where, args = " WHERE state = 'pending' AND expires_ms > ?", []any{now}
	case client.Expired:
		where, args = " WHERE state = 'pending' AND expires_ms <= ?", []any{now}
	case client.Granted, client.Denied, client.Withdrawn, client.Revoked:
		where, args = " WHERE state = ?", []any{state}
	default:
		return nil, nucleus.Errorf(nucleus.KindInvalid, "unknown state %q", state)
	}
	//nolint:gosec // where is one of the constants above
	rows, err := s.db.Query(`SELECT id, state, pod, op, summary, need, (SELECT json_group_array(approver) FROM (SELECT approver FROM grants WHERE ask = id ORDER BY given_ms, rowid)),
		sha256, created_ms, expires_ms, LENGTH(canonical) = 0 FROM asks`+where+" ORDER BY created_ms DESC, id DESC LIMIT ?", append(args, most)...)
	if err != nil {
		return nil, unavailable(err)
	}
	defer rows.Close()
	items = []client.Item{}
	for rows.Next() {
		var i client.Item
		var granted string
		if err := rows.Scan(&i.ID, &i.State, &i.Pod, &i.Op, &i.Summary, &i.Need, &granted, &i.AskDigest, &i.Created, &i.Expires, &i.Shed); err != nil {
			return nil, unavailable(err)
		}
		if err := json.Unmarshal([]byte(granted), &i.Granted); err != nil {
			return nil, unavailable(err)
		}
		i.State = askRow{state: i.State, expires: i.Expires}.stateAt(now)
		items = append(items, i)
	}
	slices.Reverse(items)
	return items, unavailable(rows.Err())
}

// Log implements witness.Store.
func (s *store) Log(origin string) (key string, signed []byte, err error) {
	err = s.db.QueryRow("SELECT key, checkpoint FROM logs WHERE origin = ?", origin).Scan(&key, &signed)
	if errors.Is(err, sql.ErrNoRows) {
		err = witness.ErrUnknownLog
	}
	return key, signed, err
}

// Keep implements witness.Store.
func (s *store) Keep(origin string, signed []byte) error {
	result, err := s.db.Exec("UPDATE logs SET checkpoint = ? WHERE origin = ?", signed, origin)
	return exactlyOne(result, err)
}

// addLog keeps a key unless the log has one, and returns the one it has.
func (s *store) addLog(origin, key string) (string, error) {
	if _, err := s.db.Exec("INSERT INTO logs (origin, key) VALUES (?, ?) ON CONFLICT DO NOTHING", origin, key); err != nil {
		return "", err
	}
	known, _, err := s.Log(origin)
	return known, err
}

func (s *store) forgetLog(origin string) error {
	_, err := s.db.Exec("DELETE FROM logs WHERE origin = ?", origin)
	return err
}
