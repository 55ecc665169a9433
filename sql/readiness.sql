-- Those of the named migrations that this database has not had yet, and whether it takes no writes.
--   $1 names  text[]
SELECT coalesce(array_agg(name ORDER BY name), '{}') AS missing,
       current_setting('transaction_read_only')::boolean AS read_only
  FROM unnest($1::text[]) AS wanted (name)
 WHERE name NOT IN (SELECT migration_id FROM _yoyo_migration);
