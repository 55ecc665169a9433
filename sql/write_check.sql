-- read
--
-- Commit a transaction that changes no table, to see whether the database takes writes. It has to
-- wait for a synchronous standby as any other write does. Logical replication slots get a message,
-- which nobody needs to read. A standby and a read-only database refuse to lock rows, and so they
-- refuse this, although no row is locked.
-- Marked as a read so that concurrent probes share one call, and so that a success does not count
-- as a recovery: it succeeds even when the disk is full.
SELECT pg_logical_emit_message(true, 'incidents', 'ready'),
       EXISTS (SELECT FROM incidents WHERE false FOR KEY SHARE);
